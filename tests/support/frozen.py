"""Imported last by tests/support/forks.py's server: its children skip what it loaded in garbage collection."""

import gc

gc.freeze()
