"""YAML files into pydantic models, with messages that name file, line, key, and the nearest valid word."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from bamboo.errors import InputError, suggest
from md.yaml_source import Key, read_yaml

M = TypeVar("M", bound=BaseModel)
Problem = tuple[Key, str]

# what pydantic calls Python types, in the words of YAML
_EXPECTED = dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "expected `key: value` lines")
_EXPECTED |= dict.fromkeys(("list_type", "tuple_type"), "expected a list")
_EXPECTED |= {"too_long": "expected a shorter list", "string_type": "expected text", "path_type": "expected a path"}


def load_yaml(path: str | Path, model: type[M], *, checks: Callable[[M], list[Problem]] | None = None) -> M:
    """Read a YAML file as a pydantic model.

    checks  rules that join several keys: takes the model, returns (key, problem) pairs
    Raises InputError that lists every problem as ``file:line: key.path: problem``, in the order of the file.
    """
    source = read_yaml(Path(path))
    try:
        loaded = model.model_validate(source.data)
    except ValidationError as error:
        problems = [_explain(model, source.data, details) for details in error.errors()]
    else:
        problems = checks(loaded) if checks is not None else []
        if not problems:
            return loaded
    problems.sort(key=lambda problem: source.line(problem[0]))
    raise InputError("\n".join(dict.fromkeys(source.message(*problem) for problem in problems)))


def _explain(model: type[BaseModel], data: Any, details: Any) -> Problem:
    """Turn one pydantic error into the key as the user wrote it and a message about it."""
    kind, given, context = details["type"], details["input"], details.get("ctx", {})
    key = _as_written(details["loc"], data)
    word = str(key[-1]) if key else ""
    if kind == "extra_forbidden":
        known = _known_keys(model, details["loc"][:-1])
        return key, f"unknown key '{word[:40]}'.{suggest(word, known) or _listing('keys', known)}"
    if kind == "missing":
        return key[:-1], f"the key '{word}' is missing."
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        field = str(context["discriminator"]).strip("'")
        if kind == "union_tag_not_found":
            return (*key, field), f"the key '{field}' is missing."
        tags, tag = _quoted(context["expected_tags"]), str(context["tag"])
        return (*key, field), f"unknown {field} '{tag[:40]}'.{suggest(tag, tags) or _listing(field + 's', tags)}"
    if kind == "literal_error":
        choices = _quoted(context["expected"])
        return key, f"unknown value {given!r:.60}.{suggest(str(given), choices) or _listing('values', choices)}"
    if kind == "bamboo":
        return key, str(details["msg"])
    expected = _EXPECTED.get(kind, str(details["msg"]).replace("Input should be", "expected"))
    return key, f"{expected}, got {given!r:.60}."


def _listing(what: str, known: list[str]) -> str:
    return f" Known {what}: {', '.join(known)}."


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text)


def _as_written(location: Key, data: Any) -> Key:
    """Drop the parts of pydantic's path that are no keys of the file: the tags of unions."""
    key: list[str | int] = []
    for depth, part in enumerate(location):
        inside = part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int)
        if inside or depth == len(location) - 1:
            key.append(part)
            data = data[part] if inside else None
    return tuple(key)


def _known_keys(model: type[BaseModel], location: Key) -> list[str]:
    """Return the keys accepted at a location, following fields and the tags of unions."""
    candidates = [model]
    for part in location:
        tagged = [
            c for c in candidates if "kind" in c.model_fields and part in get_args(c.model_fields["kind"].annotation)
        ]
        if tagged:
            candidates = tagged
        elif isinstance(part, str):
            fields = [c.model_fields[part] for c in candidates if part in c.model_fields]
            candidates = [nested for field in fields for nested in _models_in(field.annotation)]
    return list(dict.fromkeys(name for candidate in candidates for name in candidate.model_fields))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]
