"""YAML text to plain data, with the line of every key, so that messages can say ``file:line: key.path: problem``."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from bamboo.errors import InputError, suggest

Key = tuple[str | int, ...]
MAX_BYTES = 1_000_000
MAX_NODES = 20_000  # aliases of aliases can expand without limit
MAX_DEPTH = 20


@dataclass(frozen=True)
class YamlSource:
    """Plain data of a YAML file (dicts, lists, scalars) and the line, from 1, on which each key or item stands."""

    name: str
    data: dict[str, Any]
    lines: dict[Key, int]

    def line(self, key: Key) -> int:
        """Return the line of a key, or of the nearest enclosing one."""
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines.get(key, 1)

    def message(self, key: Key, problem: str) -> str:
        """Return ``file:line: key.path: problem``."""
        path = ".".join(str(part) for part in key)
        where = f"{self.name}:{self.line(key)}"
        return f"{where}: {path}: {problem}" if path else f"{where}: {problem}"


def read_yaml(path: Path) -> YamlSource:
    """Read a YAML file whose top level is a mapping; raises InputError with file and line for anything else."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a YAML file.")
    if not path.exists():
        parent = path.parent
        near = [p.name for p in parent.iterdir() if p.suffix in (".yaml", ".yml")] if parent.is_dir() else []
        raise InputError(f"{path}: no such file.{suggest(path.name, near)}")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
    if len(raw) > MAX_BYTES:
        raise InputError(f"{path}: {len(raw)} bytes, expected a configuration of at most {MAX_BYTES}.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8 text. Is this the right file?") from error
    return parse_yaml(text, name=str(path))


def parse_yaml(text: str, *, name: str) -> YamlSource:
    """Parse YAML 1.2 text; see ``read_yaml``."""
    try:
        root = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        problem = error.problem or error.context or "cannot be parsed"
        raise InputError(f"{name}:{line}: not valid YAML: {problem}.") from error
    except (YAMLError, ValueError, RecursionError) as error:
        raise InputError(
            f"{name}: not valid YAML: {str(error).splitlines()[0] if str(error) else 'too deep'}."
        ) from error
    if root is None:
        raise InputError(f"{name}: is empty. Start with, for example, `electrolyte: 1 m LiPF6 in EC:DMC 30:70 wt`.")
    reader = _Reader(name)
    data = reader.plain(root, ())
    if not isinstance(data, dict):
        raise InputError(f"{name}:{root.start_mark.line + 1}: expected `key: value` lines, got {_kind(root)}.")
    return YamlSource(name, data, reader.lines)


class _Reader:
    """Walks the node tree once; its state is the line table and the number of nodes seen."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[Key, int] = {}
        self.n_nodes = 0

    def plain(self, node: Node, key: Key) -> Any:
        self.n_nodes += 1
        line = node.start_mark.line + 1
        self.lines.setdefault(key, line)
        if self.n_nodes > MAX_NODES or len(key) > MAX_DEPTH:
            raise InputError(f"{self.name}:{line}: too large or too deeply nested for a configuration.")
        if isinstance(node, MappingNode):
            return self._mapping(node, key)
        if isinstance(node, SequenceNode):
            return [self.plain(item, (*key, index)) for index, item in enumerate(node.value)]
        return self._scalar(node, line)

    def _mapping(self, node: MappingNode, key: Key) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                raise InputError(f"{self.name}:{line}: a key must be one word, got {_kind(key_node)}.")
            name = str(key_node.value)
            if name in data:
                first = self.lines[(*key, name)]
                path = ".".join(str(part) for part in (*key, name))
                raise InputError(f"{self.name}:{line}: {path}: this key was already given on line {first}.")
            self.lines[(*key, name)] = line
            data[name] = self.plain(value_node, (*key, name))
        return data

    def _scalar(self, node: Node, line: int) -> Any:
        tag, text = str(node.tag).removeprefix("tag:yaml.org,2002:"), str(node.value)
        if tag not in ("null", "bool", "int", "float", "str", "timestamp", "value", "merge"):
            raise InputError(f"{self.name}:{line}: the tag '{tag[:40]}' is not supported. Write plain values.")
        try:
            match tag:
                case "null":
                    return None
                case "bool":
                    return text.lower() in ("true", "yes", "on")
                case "int":
                    return int(text.replace("_", ""), 0 if text.lstrip("+-").startswith(("0x", "0o", "0b")) else 10)
                case "float":
                    value = float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan").lower())
                    if not math.isfinite(value):
                        raise ValueError
                    return value
        except ValueError:
            raise InputError(f"{self.name}:{line}: '{text[:40]}' is not a number that can be used here.") from None
        return text


def _kind(node: Node) -> str:
    if isinstance(node, SequenceNode):
        return "a list"
    return "a mapping" if isinstance(node, MappingNode) else f"'{str(node.value)[:40]}'"
