"""Processes on this machine: how they are started and how they end. Imports no torch."""
