"""Measures the work of a piece of code in a way that a busy machine does not change."""

import sys
from collections.abc import Callable


def calls(work: Callable[[], object]) -> int:
    """Return how many functions are called, including those in C, which shows repeated work in Python.

    The work of a single call in C, such as a regular expression, is not visible.
    """
    count = 0

    def tally(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(tally)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count
