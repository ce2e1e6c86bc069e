"""Processes on this machine: how they start and end, and what they use of its devices, memory and disks.

Imports no torch.
"""
