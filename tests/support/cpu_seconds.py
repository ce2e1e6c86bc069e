"""`pytest -p cpu_seconds` reports the CPU-seconds of each module, which other work on the machine does not change."""

import resource
from collections import defaultdict
from collections.abc import Iterator

import forks
import pytest

_spent: dict[str, float] = defaultdict(float)


def _seconds() -> float:
    """Return the CPU time of this process and of all descendants that have exited and were waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used) + forks.cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before = _seconds()
    try:
        return (yield)
    finally:
        _spent[item.nodeid] += _seconds() - before


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("CPU-seconds")
    for name, seconds in sorted(_spent.items(), key=lambda pair: -pair[1]):
        if seconds >= 0.5:
            terminalreporter.line(f"{seconds:8.1f}  {name}")
    terminalreporter.line(f"{sum(_spent.values()):8.1f}  in all")
