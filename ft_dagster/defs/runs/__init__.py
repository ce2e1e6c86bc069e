"""Runs and their processes."""
