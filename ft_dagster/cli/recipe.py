"""`ft-dagster recipe`: what is trained and how, with every default filled in."""

import typer
import yaml
from rich.console import Console

from ft_dagster.cli.common import Json, errors_said, print_json
from ft_dagster.config.recipe_file import load_recipe
from ft_dagster.config.settings import load_settings


def recipe(as_json: Json = False) -> None:
    """Print the recipe in use as YAML, with every default filled in: a file to change and to name in FT_RECIPE.

    Exit codes: 0 printed; 1 the recipe cannot be used.
    """
    with errors_said(Console(stderr=True)):
        settings = load_settings()
        resolved = load_recipe(settings.recipe, settings.workspace).model_dump(mode="json")
    if as_json:
        print_json(resolved)
    else:
        typer.echo(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), nl=False)
