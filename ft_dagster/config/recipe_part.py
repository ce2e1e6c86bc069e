"""What all parts of a recipe are: how keys and hashes count their fields, also when later versions have others."""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Part(BaseModel):
    """One part: its fields, and how keys count them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    LATER: ClassVar[Collection[str]] = ()
    """Fields that came after adapters had been made without them. They count in keys only where they differ from their
    default, so that an upgrade trains nothing again."""
    REMOVED: ClassVar[Mapping[str, Any]] = {}
    """Fields that there were, with the values that they had by default: keys go on counting them so, and a recipe may
    still name them with these values."""

    @model_validator(mode="before")
    @classmethod
    def _accept_removed(cls, content: Any) -> Any:
        """Leave out removed fields that say what is done now anyway; refuse others."""
        if not isinstance(content, Mapping):
            return content
        for name, value in cls.REMOVED.items():
            if name in content and content[name] != value:
                raise PydanticCustomError("removed", "{field} is not {value}", {"field": name, "value": value})
        return {name: value for name, value in content.items() if name not in cls.REMOVED}

    def for_keys(self, include: Collection[str] | None = None, exclude: Collection[str] = ()) -> dict[str, Any]:
        """The part as plain JSON, as keys and hashes of what is made by it count it.

        Args:
            include: names of the fields that count; all where it is None.
            exclude: names of fields that do not count.
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
