"""Fuzzing with hostile chapters: invariants that hold for any bytes, and targets that search for violations."""
