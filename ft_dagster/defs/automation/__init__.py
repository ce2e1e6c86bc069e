"""Automation that keeps the graph up to date, and the plan of what a run would do."""
