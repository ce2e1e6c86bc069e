"""Measurements of the machine that the tests run on."""

from pathlib import Path

from ft_dagster.config.settings import Settings
from ft_dagster.runtime.number_format import machine_rates, remember_rates

_CACHE = Settings().cache
"""The cache of the user who runs the tests; measurements are kept there between test runs."""


def remember_machine(cache: Path) -> Path:
    """Copy this machine's measured speed into a separate cache, so that tests need not measure it; return the cache."""
    remember_rates(cache, machine_rates(_CACHE))
    return cache
