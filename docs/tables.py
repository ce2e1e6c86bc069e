"""Generate the tables of fields, from the models that read them, and of licenses, from the installed packages."""

import json
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from ft_dagster.config.recipe import Recipe
from ft_dagster.config.settings import Settings, variable
from ft_dagster.defs.executors.pods import Pods

DOCS = Path(__file__).parent
_TABLE = re.compile(r"(<!-- table: (\w+),.*?-->\n).*?(<!-- end of table -->)", re.DOTALL)
_KINDS = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text", Path: "path", SecretStr: "text"}
_BOUNDS = {Ge: (" from", "ge"), Gt: (" above", "gt"), Le: (" to", "le"), Lt: (", below", "lt")}


def with_tables(page: str) -> str:
    """Return a page whose tables, between the comments that mark them, are regenerated."""
    return _TABLE.sub(lambda found: f"{found[1]}{_TABLES[found[2]]()}{found[3]}", page)


def recipe_table() -> str:
    """Return a table of every field of a recipe, part by part."""
    return _fields_table(Recipe)


def pods_table() -> str:
    """Return a table of every field of the file that FT_K8S names."""
    return _fields_table(Pods)


def _fields_table(model: type[BaseModel]) -> str:
    rows = [("field", "default", "values", "")]
    for name, field in model.model_fields.items():
        part = field.annotation
        if isinstance(part, type) and issubclass(part, BaseModel):
            rows.append((f"**`{name}`**", "", "", part.__doc__ or ""))
            rows += [(f"`{name}`", *_cells(field)) for name, field in part.model_fields.items()]
        else:
            rows.append((f"`{name}`", *_cells(field)))
    return _table(rows)


def settings_table() -> str:
    """Return a table of every variable that is read from the environment and from `.env`."""
    rows = [("variable", "default", "values", "")]
    rows += [(f"`{variable(name)}`", *_cells(field, unset="")) for name, field in Settings.model_fields.items()]
    return _table(rows)


def licences_table() -> str:
    """Return a table of every package of the locks that is installed, with the license that it names."""
    asked = [sys.executable, "-m", "piplicenses", "--from=mixed", "--format=json", "--with-system", "--with-urls"]
    said = subprocess.run(asked, check=True, capture_output=True).stdout
    locks = (path.read_text() for path in DOCS.parent.glob("requirements*.lock"))
    locked = {_normalized(name) for lock in locks for name in _LOCKED.findall(lock)}
    found = {package["Name"].lower(): package for package in json.loads(said)}
    rows = [("package", "version", "license")]
    for name, package in sorted(found.items()):
        if _normalized(name) in locked:
            home = package["URL"]
            licence = _ONLY_A_TEXT.get(name, package["License"])
            rows.append((f"[{name}]({home})" if home != "UNKNOWN" else name, package["Version"], licence))
    return _table(rows)


def _normalized(name: str) -> str:
    """Normalize a package name as PEP 503 describes."""
    return re.sub("[-_.]+", "-", name).lower()


_ONLY_A_TEXT = {"huey": "MIT", "skops": "MIT"}
"""Packages whose metadata name no license -> the license whose text they contain."""
_LOCKED = re.compile(r"^([\w.-]+)==", re.MULTILINE)
_TABLES = {"recipe": recipe_table, "settings": settings_table, "pods": pods_table, "licences": licences_table}


def _table(rows: list[tuple[str, ...]]) -> str:
    heading, *body = ("|".join(["", *map(_cell, row), ""]) for row in rows)
    return "\n".join([heading, "|---" * len(rows[0]) + "|", *body, ""])


def _cell(text: str) -> str:
    on_one_line = " ".join(text.replace("|", "\\|").split())
    return f" {on_one_line} " if on_one_line else " "


def _cells(field: FieldInfo, unset: str = "`null`") -> tuple[str, str, str]:
    """Return default, values and description of a field. `unset` stands for None."""
    return _default(field, unset), _values(field, unset), field.description or ""


def _default(field: FieldInfo, unset: str) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "the current folder" if field.default_factory == Path.cwd else ""
    if field.default is None:
        return unset
    return f"`{field.default if isinstance(field.default, (str, Path)) else json.dumps(field.default)}`"


def _values(field: FieldInfo, unset: str) -> str:
    """Describe the values that a field accepts, and their bounds, such as `number from 0 to 1`."""
    kinds = list(dict.fromkeys(_kinds(field.annotation)))
    bounds = "".join(_bounds(field.metadata))
    may_be_unset = [unset] if unset and type(None) in get_args(field.annotation) else []
    return " or ".join([", ".join(kinds) + bounds, *may_be_unset])


def _kinds(annotation: Any) -> Iterator[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        for argument in arguments:
            yield from _kinds(argument)
    elif origin is Literal:
        yield from (f"`{value}`" for value in arguments)
    elif origin in (list, tuple):
        yield "list of texts" if arguments[0] is str else "list of maps"
    elif origin is dict:
        yield "map"
    elif annotation is not type(None):
        yield _KINDS[annotation]


def _bounds(metadata: list[Any]) -> Iterator[str]:
    for bound in metadata:
        if type(bound) in _BOUNDS:
            word, name = _BOUNDS[type(bound)]
            yield f"{word} {getattr(bound, name):g}"
        elif isinstance(bound, MinLen):
            yield ", not empty"


if __name__ == "__main__":
    for path in DOCS.glob("*.md"):
        path.write_text(with_tables(path.read_text("utf-8")), "utf-8")
