"""Estimates of a training's operations, memory and time, and whether it fits. Imports torch only to inspect a GPU."""
