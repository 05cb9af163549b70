"""The types that fields of the configuration share, and how their values are read.

Values are checked strictly; only text becomes a number, true, false or null if the key wants one of these, because
`--config` and YAML (1e-4) give text.
"""

import datetime
import math
import types
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError, core_schema

NULLS = ("", "~", "null", "Null", "NULL")
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
LARGEST = 10**30  # a larger number is a mistake: no count or number of operations reaches it
# The kinds of values, with the words of messages and of the reference page
KINDS = {
    "text": "text",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "list": "a list",
    "mapping": "a mapping",
    "null": "null",
}
TAG = "\0"  # begins the part of an error's place that names a member of a union; no key may contain it

T = TypeVar("T")


class NumberAsWritten:
    """A number that stays an integer if it is written as one: names and records show it as the user wrote it."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Accept an integer or a finite number."""
        kinds = [
            core_schema.int_schema(strict=True, ge=-LARGEST, le=LARGEST),
            core_schema.float_schema(strict=True, ge=-LARGEST, le=LARGEST, allow_inf_nan=False),
        ]
        return core_schema.union_schema(kinds, custom_error_type="number_type", custom_error_message="number")

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Describe it as a number."""
        return {"type": "number"}


# Pydantic has no such type, and for a type checker the values are plain numbers
if TYPE_CHECKING:
    Number = float
else:
    Number = NumberAsWritten


@dataclass(frozen=True)
class ByKind:
    """Marks a union: the kind of the value decides which member checks it, so that its error alone is reported."""

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Let the member check the value that takes values of its kind."""
        choices = {}
        for member in get_args(source):
            choices[TAG + form_of(member).kinds[0]] = handler.generate_schema(member)
        return core_schema.tagged_union_schema(
            choices, lambda value: TAG + kind_of(value), custom_error_type="kind_type", custom_error_message="kind"
        )


@dataclass(frozen=True)
class NotNull:
    """Marks a field that is None if its key is left out, but whose key cannot be set to null."""

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Reject null before the field's own checks."""
        return core_schema.no_info_before_validator_function(_reject_null, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Describe the field as one without null."""
        whole = handler(schema["schema"])
        (member,) = [one for one in whole.pop("anyOf") if one != {"type": "null"}]
        return whole | member


def _reject_null(value: T) -> T:
    if value is None:
        raise PydanticCustomError("null_type", "null")
    return value


def _check_unique(values: list[Any]) -> list[Any]:
    twice = next((item for place, item in enumerate(values) if item in values[:place]), None)
    if twice is not None:
        raise PydanticCustomError("twice", "twice", {"item": twice})
    return values


def _check_day(text: str) -> str:
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise PydanticCustomError("string_pattern_mismatch", "no day") from None


Day = Annotated[str, AfterValidator(_check_day), Field(json_schema_extra={"format": "date"})]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Text = Annotated[str, Field(min_length=1)]
Unique = Annotated[list[T], AfterValidator(_check_unique), Field(json_schema_extra={"uniqueItems": True})]
Named = dict[str, T]  # whose keys the user chooses; null drops an entry
Inherited = Annotated[T | None, NotNull()]


@dataclass(frozen=True)
class Form:
    """What values a key takes, read off its annotation.

    Attributes:
        kinds: names of `KINDS`, in their order.
        choices: the valid values if there are only some, null as None.
        items: the annotation of a list's items.
        entries: the annotation of the values of a mapping whose keys the user chooses.
        section: the model of a mapping with fixed keys.
    """

    kinds: tuple[str, ...] = ()
    choices: tuple[Any, ...] = ()
    items: Any = None
    entries: Any = None
    section: type[BaseModel] | None = None


def form_of(annotation: object) -> Form:
    """Return the `Form` of an annotation."""
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _marked(form_of(members[0]), members[1:])
    if origin in (Union, types.UnionType):
        return _joined([form_of(member) for member in members])
    if origin is Literal:
        return Form(("text",), members)
    if origin is list or annotation is list:
        return Form(("list",), items=next(iter(members), None))
    if origin is dict:
        return Form(("mapping",), entries=members[1])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return Form(("mapping",), section=annotation)
    kinds = {str: "text", int: "integer", Number: "number", bool: "boolean", type(None): "null"}
    return Form((kinds[annotation],)) if annotation in kinds else Form()


def form_of_field(field: FieldInfo) -> Form:
    """Return the `Form` of a field."""
    return _marked(form_of(field.annotation), field.metadata)


def _marked(form: Form, marks: Iterable[object]) -> Form:
    if any(isinstance(mark, NotNull) for mark in marks):
        given = [choice for choice in form.choices if choice is not None]
        return replace(form, kinds=tuple(kind for kind in form.kinds if kind != "null"), choices=tuple(given))
    return form


def _joined(forms: list[Form]) -> Form:
    kinds = {kind for form in forms for kind in form.kinds}
    choices = [choice for form in forms for choice in form.choices]
    return Form(
        kinds=tuple(kind for kind in KINDS if kind in kinds),
        choices=(*choices, *([None] if choices and "null" in kinds else [])),
        items=next((form.items for form in forms if form.items), None),
        entries=next((form.entries for form in forms if form.entries), None),
        section=next((form.section for form in forms if form.section), None),
    )


def kind_of(value: object) -> str:
    """Return the kind of a value, as unions tell their members apart: numbers of both kinds are a "number"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    kinds = {str: "text", int: "number", float: "number", list: "list", dict: "mapping"}
    return "mapping" if isinstance(value, BaseModel) else kinds.get(type(value), "")


def as_read(value: object, form: Form) -> object:
    """Return a value with text converted to what the form wants; other values and wrong text are left as they are."""
    if isinstance(value, list) and form.items:
        items = form_of(form.items)
        return [as_read(item, items) for item in value]
    if isinstance(value, dict) and form.entries:
        entries = form_of(form.entries)
        read = {key: as_read(item, entries) for key, item in value.items()}
        # null drops an entry that an overridden file defines
        return {key: item for key, item in read.items() if not says_null(item)}
    if isinstance(value, str):
        return _from_text(value, form.kinds)
    if isinstance(value, float) and value.is_integer() and form.kinds[:1] == ("integer",):
        return int(value)
    return value


def says_null(value: object) -> bool:
    """Return whether a value is null, also as text."""
    return value is None or (isinstance(value, str) and value in NULLS)


def _from_text(text: str, kinds: tuple[str, ...]) -> str | float | bool | None:
    """Convert text such as "3" or "true" if another kind than text is wanted; return other text unchanged."""
    if "null" in kinds and text in NULLS:
        return None
    if "text" in kinds:
        return text
    if "boolean" in kinds and text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    if "integer" not in kinds and "number" not in kinds:
        return text
    try:
        number = float(text)
    except ValueError:
        return text
    if not math.isfinite(number):
        return text
    if number.is_integer() and ("integer" in kinds or "." not in text):
        return int(text) if text.strip("+- ").isdecimal() else int(number)
    return number
