"""Imported last by the server of tests/support/forks.py: garbage collectors of its children leave alone what it loaded."""

import gc

gc.freeze()
