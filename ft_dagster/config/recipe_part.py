"""The base class of a recipe's parts. It keeps keys and hashes the same when later versions add or remove fields."""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Part(BaseModel):
    """A part of a recipe: its fields, and how they enter keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    LATER: ClassVar[Collection[str]] = ()
    """Fields that were added after adapters had been made. They enter keys only if they differ from their default, so
    that an upgrade retrains nothing."""
    REMOVED: ClassVar[Mapping[str, Any]] = {}
    """Fields that were removed, with their former defaults, which still enter keys and may stand in a recipe."""

    @model_validator(mode="before")
    @classmethod
    def _accept_removed(cls, content: Any) -> Any:
        """Drop removed fields that have their former default; refuse other values."""
        if not isinstance(content, Mapping):
            return content
        for name, value in cls.REMOVED.items():
            if name in content and content[name] != value:
                raise PydanticCustomError("removed", "{field} is not {value}", {"field": name, "value": value})
        return {name: value for name, value in content.items() if name not in cls.REMOVED}

    def for_keys(self, include: Collection[str] | None = None, exclude: Collection[str] = ()) -> dict[str, Any]:
        """Return the part as plain JSON, as it enters keys and hashes.

        Args:
            include: names of the fields to return; None for all.
            exclude: names of fields to leave out.
        """
        dumped = {**self.REMOVED, **self.model_dump(mode="json")}
        fields = type(self).model_fields.items()
        defaults = {name: field.get_default(call_default_factory=True) for name, field in fields}
        return {
            name: value
            for name, value in dumped.items()
            if (include is None or name in include)
            and name not in exclude
            and not (name in self.LATER and getattr(self, name) == defaults[name])
        }
