"""Recipes in files: found by name or path, resolved against the fields of `Recipe`, and refused with a clear error."""

import difflib
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ft_dagster.config.recipe import Recipe
from ft_dagster.errors import UserError

DEFAULT_RECIPE = "smollm2-135m"


class RecipeError(UserError):
    """A recipe that cannot be used; the message names the field and what to do."""


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = resources.files("ft_dagster.config") / "recipes"
    return sorted(Path(item.name).stem for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_recipe(name_or_path: str, workspace: Path | None = None) -> Recipe:
    """Read a shipped recipe by name, or a YAML file by path (relative to the workspace).

    Raises:
        RecipeError: the recipe does not exist, is not YAML, or has an unknown, missing or contradictory field.
    """
    if name_or_path in shipped_recipes():
        text = (resources.files("ft_dagster.config") / "recipes" / f"{name_or_path}.yaml").read_text("utf-8")
    else:
        path = (workspace or Path.cwd()) / Path(name_or_path).expanduser()
        try:
            text = path.read_text("utf-8")
        except OSError as error:
            raise RecipeError(
                f"There is no recipe {name_or_path!r}: {error.strerror} ({path}). "
                f"Shipped recipes: {', '.join(shipped_recipes())}; or set FT_RECIPE to a YAML file."
            ) from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"The recipe {name_or_path} is not UTF-8 text: {error}") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"The recipe {name_or_path} is not YAML: {error}") from error
    recipe = resolve_recipe(content, origin=name_or_path)
    if recipe.base.source == "folder" and workspace is not None:
        recipe = recipe.model_copy(update={"base": recipe.base.located(workspace)})
    return recipe


def recipe_of_adapter(content: Mapping[str, Any]) -> Recipe:
    """Return the recipe in an adapter's manifest, as far as today's fields can express it.

    An earlier version may have had other fields: fields that were removed since are ignored.
    """
    parts = {name: getattr(field.annotation, "REMOVED", {}) for name, field in Recipe.model_fields.items()}
    known = {
        name: {key: value for key, value in part.items() if key not in parts.get(name, {})}
        if isinstance(part, Mapping)
        else part
        for name, part in content.items()
    }
    return resolve_recipe(known, "of the adapter")


def resolve_recipe(content: Any, origin: str = "recipe") -> Recipe:
    """Return a recipe made of plain data and defaults. Raises RecipeError, which names the fields, if it is invalid."""
    if not isinstance(content, dict):
        raise RecipeError(f"The recipe {origin} must be a mapping with the fields {', '.join(Recipe.model_fields)}.")
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(_describe(problem) for problem in error.errors())
        raise RecipeError(f"The recipe {origin} cannot be used: {problems}.") from error


def _describe(problem: Any) -> str:
    where = ".".join(str(step) for step in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{where} is not a field of a recipe ({_nearest_field(problem['loc'])})"
    if problem["type"] == "removed":
        field, value = problem["ctx"]["field"], problem["ctx"]["value"]
        return f"{where}.{field} was removed, and what {value!r} did is done always: leave the line out"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "literal_error":
        values = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        nearest = difflib.get_close_matches(str(problem["input"]), values, n=1, cutoff=0.5)
        message += f", not {problem['input']!r}" + (f" (did you mean {nearest[0]}?)" if nearest else "")
    return f"{where}: {message}" if where and where not in message else message


def _nearest_field(where: Sequence[Any]) -> str:
    """Suggest what an unknown field was meant to be: a field of the same part, or of another."""
    *parents, unknown = where
    part: Any = Recipe
    for parent in parents:
        part = part.model_fields[parent].annotation
    everywhere = {
        name: f"{owner}.{name}"
        for owner, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        for name in field.annotation.model_fields
    }
    if unknown in everywhere:
        return f"did you mean {everywhere[unknown]}?"
    nearest = difflib.get_close_matches(str(unknown), part.model_fields, n=1, cutoff=0.5)
    return f"did you mean {nearest[0]}?" if nearest else f"known here: {', '.join(part.model_fields)}"
