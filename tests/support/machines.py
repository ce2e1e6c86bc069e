"""What is known of the machine that the tests run on."""

from pathlib import Path

from ft_dagster.config.settings import Settings
from ft_dagster.runtime.number_format import machine_rates, remember_rates

_CACHE = Settings().cache
"""Of the user who runs the tests: what is measured there is kept between runs of tests."""


def remember_machine(cache: Path) -> Path:
    """Put into a cache of its own how fast this machine is, so that not every test measures it; gives the cache."""
    remember_rates(cache, machine_rates(_CACHE))
    return cache
