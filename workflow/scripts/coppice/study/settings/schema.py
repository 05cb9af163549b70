"""Apply the closed schema of the configuration: convert scalars to its types, word its violations, fill in defaults."""

import copy
import math
import unicodedata
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path

import yaml

from coppice.core.errors import SettingsError, nearest

SCHEMA_FILE = Path(__file__).parents[4] / "schemas" / "config.schema.yaml"
PLAIN = "\n\t\u200c\u200d"  # invisible characters of ordinary text (the joiners occur in Persian and in emoji)
NULLS = ("", "~", "null", "Null", "NULL")
# A larger value is a mistake: libraries hold no integer above 2^63. Operations of a training (FLOPs) are floats.
LARGEST = {"integer": 10**15, "number": 10**30}
LONGEST = 10_000  # characters of any text value
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
KINDS = {
    "string": "text",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}


@cache
def schema():
    """Return the schema with its references resolved. It is cached: callers must not change it."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = yaml.load(SCHEMA_FILE.read_text(encoding="utf-8"), Loader=loader)
    return _without_references(text, text["$defs"])


def _without_references(node, definitions):
    if isinstance(node, list):
        return [_without_references(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        node = {**definitions[node["$ref"].rsplit("/", 1)[1]], **{k: v for k, v in node.items() if k != "$ref"}}
    return {key: _without_references(value, definitions) for key, value in node.items() if key != "$defs"}


def key_paths(node=None, path=()):
    """Yield (path, node) of every key in the schema; `<name>` is a key that the user chooses, [] a list's items."""
    node = schema() if node is None else node
    if path:
        yield path, node
    for key, child in node.get("properties", {}).items():
        yield from key_paths(child, (*path, key))
    if isinstance(node.get("additionalProperties"), dict):
        yield from key_paths(node["additionalProperties"], (*path, "<name>"))
    if node.get("items", {}).get("properties"):
        for key, child in node["items"]["properties"].items():
            yield from key_paths(child, (*path[:-1], path[-1] + "[]", key))


def dotted(path):
    """Return a path as text: ("models", "Llama", "prune", 0, "ratio") becomes `models.Llama.prune[0].ratio`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def checked(raw):
    """Return a copy of `raw` with scalars converted to the schema's types and without dropped (null) entries.

    Raises SettingsError if the configuration violates the schema.
    """
    return checked_part(raw, schema(), ())


def checked_part(raw, node, path):
    """Do the same for a part of a configuration.

    Args:
        raw: the part.
        node: its schema.
        path: its keys, for messages; the first may be dotted.
    """
    import jsonschema  # imported here because jobs import this module too but validate nothing

    part = _coerced(raw, node, path)
    validator = jsonschema.Draft202012Validator(node)
    rank = {"additionalProperties": 0, "type": 1}
    errors = sorted(validator.iter_errors(part), key=lambda error: rank.get(error.validator, 2))
    if errors:
        raise SettingsError(_message(errors[0], path))
    return part


def filled(value, node=None):
    """Return `value` with the schema's defaults filled in, in the schema's order of keys."""
    node = schema() if node is None else node
    if isinstance(value, list):
        return [filled(item, node.get("items", {})) for item in value]
    if not isinstance(value, dict):
        return value
    result = {}
    for key, child in node.get("properties", {}).items():
        if key in value:
            result[key] = filled(value[key], child)
        elif "default" in child:
            result[key] = filled(copy.deepcopy(child["default"]), child)
        elif child.get("type") == "object":
            result[key] = filled({}, child)
    for key in value:
        if key not in result:
            result[key] = filled(value[key], node["additionalProperties"])
    return result


def types_of(node):
    """Return the names of the JSON types that `node` allows."""
    if "enum" in node:
        return {"null" if value is None else "string" for value in node["enum"]}
    types = node.get("type", [])
    return {types} if isinstance(types, str) else set(types)


def is_mapping(node):
    """Return whether `node` is a section or a mapping rather than a value."""
    return types_of(node) == {"object"}


def _coerced(value, node, path):
    if isinstance(value, Mapping) and "object" in types_of(node):
        return _coerced_mapping(value, node, path)
    if isinstance(value, list | tuple):
        return [_coerced(item, node.get("items", {}), (*path, i)) for i, item in enumerate(value)]
    if isinstance(value, str):
        _check_text(value, path)
        value = _coerced_text(value, types_of(node))
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"config key {dotted(path)}: found {value}, but {_wanted(node)} is needed")
    largest = LARGEST["number" if "number" in types_of(node) else "integer"]
    if isinstance(value, int | float) and abs(value) > largest:
        raise SettingsError(
            f"config key {dotted(path)}: found a number beyond {largest:.0e}, which is too large; give a smaller one"
        )
    if isinstance(value, float) and value.is_integer() and types_of(node) <= {"integer", "null"}:
        return int(value)
    return value


def _check_text(text, path):
    """Reject control and format characters: file names and reports cannot hold them, and terminals execute some."""
    wrong = next((c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Cf") and c not in PLAIN), None)
    if wrong is not None:
        raise SettingsError(
            f"config key {dotted(path)}: contains the invisible character U+{ord(wrong):04X}; remove it"
        )
    if len(text) > LONGEST:
        raise SettingsError(f"config key {dotted(path)}: has {len(text)} characters; at most {LONGEST} are allowed")


def _coerced_mapping(value, node, path):
    children, open_node = node.get("properties", {}), node.get("additionalProperties")
    result = {}
    for key, item in value.items():
        if isinstance(key, str):
            _check_text(key, (*path, key))
        else:
            raise SettingsError(
                f"config key {dotted((*path, str(key)))}: the name {key!r} is not text; put it in quotes"
            )
        child = children.get(key, open_node if isinstance(open_node, dict) else {})
        item = _coerced(item, child, (*path, key))
        # A section whose keys are all commented out is null in YAML and counts as absent; null also drops an entry of
        # a mapping whose keys the user chooses.
        absent = item is None and (isinstance(open_node, dict) or child.get("type") == "object")
        if not absent and not (item in NULLS and isinstance(open_node, dict)):
            result[key] = item
    return result


def _coerced_text(text, types):
    """Convert text such as "3" or "true" if the schema wants another type than text; return other text unchanged."""
    if "null" in types and text in NULLS:
        return None
    if "string" in types:
        return text
    if "boolean" in types and text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    if types & {"integer", "number"}:
        try:
            number = float(text)
        except ValueError:
            return text
        if not math.isfinite(number):
            return text
        if number.is_integer() and ("integer" in types or "." not in text):
            return int(text) if text.strip("+- ").isdecimal() else int(number)
        return number
    return text


def _wanted(node):
    order = [kind for kind in KINDS if kind in types_of(node)]
    return " or ".join(KINDS[kind] for kind in order) or "another value"


def _shown(value):
    if isinstance(value, str):
        return f"'{value}'"
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list) else str(value)


def _message(error, above):
    """Word a violation in one sentence: the key (below the path `above`), what was found, what is valid."""
    path, found, bound = (*above, *error.absolute_path), error.instance, error.validator_value
    key = f"config key {dotted(path)}"
    match error.validator:
        case "additionalProperties":
            unknown = next(name for name in found if name not in error.schema["properties"])
            return unknown_key((*path, unknown), list(error.schema["properties"]))
        case "required":
            missing = next(name for name in bound if name not in found)
            return f"config key {dotted((*path, missing))} is missing: {_description(error.schema, missing)}"
        case "type":
            quotes = (
                "; put it in quotes"
                if "string" in types_of(error.schema) and not isinstance(found, dict | list)
                else ""
            )
            return f"{key}: found {_shown(found)}, but {_wanted(error.schema)} is needed{quotes}"
        case "enum":
            valid = [_shown(value).strip("'") for value in bound]
            return f"{key}: found {_shown(found)}; valid are {', '.join(valid)}{nearest(found, valid)}"
        case "uniqueItems":
            twice = next(item for i, item in enumerate(found) if item in found[:i])
            return f"{key}: {_shown(twice)} is listed twice"
        case "minItems" | "minLength":
            return f"{key}: must not be empty"
        case "pattern":
            return f"{key}: found {_shown(found)}; {' '.join(error.schema['description'].split())}"
        case limit if limit in LIMITS:
            return f"{key}: found {found}, must be {LIMITS[limit]} {bound}"
    return f"{key}: {error.message}"


def _description(node, name):
    return " ".join(node["properties"][name]["description"].split())


def unknown_key(path, siblings):
    """Word the message for an unknown key: suggest a sibling with a similar name, else the same name elsewhere."""
    name, parent = path[-1], path[:-1]
    close = get_close_matches(name, siblings, n=1, cutoff=0.5)
    if close:
        return f"config key {dotted(path)} is unknown; did you mean '{dotted((*parent, close[0]))}'?"
    elsewhere = [dotted(other) for other, _ in key_paths() if other[-1] == name]
    if elsewhere:
        return f"config key {dotted(path)} is unknown; did you mean '{elsewhere[0]}'?"
    return f"config key {dotted(path)} is unknown; valid are {', '.join(dotted((*parent, key)) for key in siblings)}"
