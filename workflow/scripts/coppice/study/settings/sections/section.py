"""The base of the configuration's sections.

A section is a Pydantic model. Its fields carry all that is known of a key: type, default, bounds, description, unit and
the stages that a change reruns.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypedDict, TypeVar, Unpack

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from .forms import Form, as_read, form_of_field, says_null

AnySection = TypeVar("AnySection", bound="Section")
OfKey = Any  # what a field holds: its annotation gives the type, as in Pydantic's own fields


class FieldOptions(TypedDict, total=False):
    """Further options of a field, with the names of Pydantic's `Field`."""

    alias: str
    exclude_if: Callable[[Any], bool]
    ge: float
    gt: float
    le: float
    lt: float
    min_length: int
    pattern: str


def setting(
    default: object, description: str, *, reruns: Sequence[str] = (), unit: str = "", **more: Unpack[FieldOptions]
) -> OfKey:
    """Return the field of a key.

    Args:
        default: the value if the key is left out; `...` if it must be given.
        description: for messages, the reference page and the editor.
        reruns: stages that a change reruns; empty: those of the section.
        unit: of the value.
        more: the bounds, the alias and `exclude_if`, as Pydantic's `Field` takes them.
    """
    extra: dict[str, Any] = {"reruns": list(reruns)} if reruns else {}
    extra |= {"unit": unit} if unit else {}
    return Field(default, description=description, json_schema_extra=extra or None, **more)


def section(
    model: type[AnySection], description: str = "", *, reruns: Sequence[str] = (), **more: Unpack[FieldOptions]
) -> AnySection:
    """Return the field of a section, which has its defaults if it is left out. description: default: the model's."""
    extra: dict[str, Any] | None = {"reruns": list(reruns)} if reruns else None
    return Field(default_factory=model, description=description or described(model), json_schema_extra=extra, **more)


def is_unset(value: object) -> bool:
    """Return whether a value is null or empty, or a section without data sets.

    As `exclude_if` of a key that an earlier version did not have, it keeps the key out of the parameters and records of
    studies that do not use it, so that nothing of theirs reruns.
    """
    return not (value.datasets if hasattr(value, "datasets") else value)


def described(model: type[BaseModel]) -> str:
    """Return a model's docstring on one line."""
    return " ".join((model.__doc__ or "").split())


class Section(BaseModel):
    """A section of the configuration."""

    OPEN: ClassVar[Any] = None  # the type of the values of further keys, whose names the user chooses

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, serialize_by_alias=True)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: object) -> object:
        """Convert text to the types of the fields, and leave out sections that are null.

        A section whose keys are all commented out is null in YAML; it counts as left out.
        """
        if not isinstance(given, dict):
            return given
        fields = {field.alias or name: field for name, field in cls.model_fields.items()}
        found = {}
        for key, value in given.items():
            form = form_of_field(fields[key]) if key in fields else Form()
            read = as_read(value, form)
            left_out = read is None and form.kinds == ("mapping",)
            if not left_out and not (cls.OPEN and says_null(read)):
                found[key] = read
        return found


class Partial(Section):
    """A section without defaults: a key that is left out is not set at all, and its value comes from elsewhere."""

    @model_serializer
    def given(self) -> dict[str, Any]:
        """Return the keys that are set, with their values."""
        return {key: getattr(self, key) for key in type(self).model_fields if key in self.model_fields_set}
