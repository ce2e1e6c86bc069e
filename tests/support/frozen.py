"""Imported last by the server of tests/support/forks.py: its children need not look for garbage in what it loaded."""

import gc

gc.freeze()
