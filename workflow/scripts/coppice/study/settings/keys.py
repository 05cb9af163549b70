"""List every key of the configuration with what its field says: the reference page, options and tests read it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .sections import Config
from .sections.forms import Form, NotNull, form_of, form_of_field
from .sections.section import Partial, described

# Pydantic's bounds, with the words of messages and of the reference page
BOUNDS = {Ge: ("ge", "at least"), Gt: ("gt", "above"), Le: ("le", "at most"), Lt: ("lt", "below")}


# What `reruns` may hold: stages, or one of two words
NOTHING, EVERYTHING = "nothing", "everything"
STAGES = ("data", "prune", "score", "select", "finetune", "evaluate", "compare", "report", "ablation")


@dataclass(frozen=True)
class Key:
    """A key of the configuration.

    Attributes:
        path: its place; `<name>` is a key that the user chooses, and a part ending in [] means the items of a list.
        form: the values it takes.
        description: what it means.
        required: whether it must be given.
        default: its value if it is left out; None too if it has none.
        reruns: the stages that a change reruns; empty: those of the section around it.
        unit: of its value.
        bounds: words and numbers, such as ("at least", 1).
        is_inherited: whether the value of a key that is left out comes from elsewhere.
    """

    path: tuple[str, ...]
    form: Form
    description: str
    required: bool = False
    default: Any = None
    reruns: tuple[str, ...] = ()
    unit: str = ""
    bounds: tuple[tuple[str, float], ...] = ()
    is_inherited: bool = False

    @property
    def is_section(self) -> bool:
        """Whether the key holds other keys rather than a value."""
        return self.form.kinds == ("mapping",)


def every_key(model: type[BaseModel] = Config, path: tuple[str, ...] = ()) -> Iterator[Key]:
    """Yield every key below a section, each section before its keys."""
    for name, own in keys_of(model).items():
        key = _of_field(model, own, (*path, name))
        yield key
        yield from _below(key.form, key.path)
    if model.OPEN:
        yield from _entries(model.OPEN, path)


def keys_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return {key: field} of a section."""
    return {own.alias or name: own for name, own in model.model_fields.items()}


def _of_field(model: type[BaseModel], own: FieldInfo, path: tuple[str, ...]) -> Key:
    extra = own.json_schema_extra or {}
    return Key(
        path=path,
        form=form_of_field(own),
        description=own.description or "",
        required=own.is_required(),
        default=own.get_default(call_default_factory=True) if not own.is_required() else None,
        reruns=tuple(extra.get("reruns", ())),
        unit=extra.get("unit", ""),
        bounds=_bounds(own.metadata),
        is_inherited=issubclass(model, Partial) or any(isinstance(mark, NotNull) for mark in own.metadata),
    )


def _bounds(marks: Iterable[object]) -> tuple[tuple[str, float], ...]:
    found = {type(mark): mark for mark in marks}
    return tuple((words, getattr(found[kind], name)) for kind, (name, words) in BOUNDS.items() if kind in found)


def _below(form: Form, path: tuple[str, ...]) -> Iterator[Key]:
    if form.section:
        yield from every_key(form.section, path)
    if form.entries:
        yield from _entries(form.entries, path)
    items = form_of(form.items).section if form.items else None
    if items:
        yield from every_key(items, (*path[:-1], path[-1] + "[]"))


def _entries(annotation: object, path: tuple[str, ...]) -> Iterator[Key]:
    """Yield the key of a mapping's entries, whose names the user chooses, and the keys below it."""
    form, path = form_of(annotation), (*path, "<name>")
    marks = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    fields = [mark for mark in marks if isinstance(mark, FieldInfo)]
    words = next((mark.description for mark in fields if mark.description), "")
    yield Key(
        path=path,
        form=form,
        description=words or (described(form.section) if form.section else ""),
        required=True,
        bounds=_bounds([mark for own in fields for mark in own.metadata]),
    )
    yield from _below(form, path)


def reruns(path: tuple[str, ...]) -> tuple[str, ...]:
    """Return the stages (a tuple) that rerun if the key at `path` changes. Stages that depend on them rerun too.

    Args:
        path: of one of `every_key`. A key without `reruns` inherits that of the nearest enclosing section.
    """
    every = {key.path: key for key in every_key()}
    ends = range(len(path), 0, -1)
    found = next((stages for end in ends if (stages := _reruns_at(every, path[:end]))), None)
    if found is None:
        raise KeyError(f"no `reruns` for {'.'.join(path)}; add it to the key or its section")
    return found


def _reruns_at(every: dict[tuple[str, ...], Key], path: tuple[str, ...]) -> tuple[str, ...]:
    """Return the `reruns` at `path`, or (); the items of a list may override that of the list."""
    if path in every:
        return every[path].reruns
    own = every[*path[:-1], path[-1].removesuffix("[]")]
    return _reruns_of_items(own.form) or own.reruns


def _reruns_of_items(form: Form) -> tuple[str, ...]:
    """Return the stages that a change of a list's items reruns; empty: those of the list."""
    items = form_of(form.items).section if form.items else None
    extra = items.model_config.get("json_schema_extra") if items else None
    return tuple((extra or {}).get("reruns", ()))
