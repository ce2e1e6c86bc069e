"""`python -m ft_dagster.cli`: the same as `ft-dagster`."""

from ft_dagster.cli import app

app()
