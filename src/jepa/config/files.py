"""JSON and YAML that somebody else may have written: data and nothing else, checked, or refused by name."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jepa.config import signatures
from jepa.errors import FileError

MAX_BYTES = 1 << 26
"""Size in bytes of the largest file that is read whole, but for annotations, which may have any size."""
MAX_DEPTH = 50
"""Levels of lists and mappings inside each other."""
MAX_INTEGER = 1 << 63
"""What a float and a tensor can still take."""
Fields = Mapping[str, str]
"""Name of a field -> its annotation, as that of a constructor's argument; "| None" where it may be missing."""
_LEAVES = (str, int, float, bool, type(None))
_BRANCHES = (dict, list)
_FAULTS = (yaml.YAMLError, ValueError, RecursionError)
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_json(path: Path, fields: Fields | None = None, *, max_bytes: int | None = MAX_BYTES) -> dict[str, Any]:
    """The mapping in a JSON file, `fields` checked. Raises FileError for what is none, deep, or too large.

    Without `max_bytes` the depth is not looked at either, and the caller checks every entry.
    """
    content = parse_json(read_bytes(path, max_bytes), path, is_checked=max_bytes is not None)
    return as_mapping(content, path, fields or {})


def read_yaml(path: Path, fields: Fields | None = None, *, aliases: bool = False) -> dict[str, Any]:
    """The mapping in a YAML file, `fields` checked. Raises FileError, for tags too, and for aliases unless allowed."""
    try:
        text = read_bytes(path, MAX_BYTES).decode("utf-8-sig")
        _check_events(text, path, aliases)
        content = yaml.load(text, Loader=_Loader)
    except _FAULTS as error:
        raise _unreadable(path, error) from error
    _check_plain(content, path)
    return as_mapping(content, path, fields or {})


def parse_json(text: str | bytes, where: object, *, is_checked: bool = True) -> Any:
    """Plain values of bounded depth. Raises FileError that names `where`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(where, error) from error
    if is_checked:
        _check_plain(content, where)
    return content


def as_mapping(content: Any, where: object, fields: Fields) -> dict[str, Any]:
    """The content, if it is a mapping whose `fields` have the type that their annotation says."""
    if not isinstance(content, dict):
        raise FileError(f"{where} holds no mapping")
    annotations = {name: signatures.parsed(text) for name, text in fields.items()}
    faults = {name: signatures.fault(annotation, name, content.get(name)) for name, annotation in annotations.items()}
    if lacking := [name for name, fault in faults.items() if fault and name not in content]:
        raise FileError(f"{where} lacks {', '.join(lacking)}")
    if wrong := [f"{name} {fault[:200]}" for name, fault in faults.items() if fault]:
        raise FileError(f"{where}: {'; '.join(wrong)}")
    return content


def read_bytes(path: Path, max_bytes: int | None = MAX_BYTES) -> bytes:
    """Raises FileError for what is no file, or a larger one."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise FileError(f"{path} cannot be read: it is no file")
        if max_bytes is not None and found.st_size > max_bytes:
            raise FileError(f"{path} has {found.st_size:,} bytes: at most {max_bytes:,} are read")
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def exists(path: Path) -> bool:
    """Raises FileError where nobody can tell."""
    try:
        return path.exists()
    except OSError as error:
        raise _unreadable(path, error) from error


def _check_events(text: str, path: Path, aliases: bool) -> None:
    """Refuse tags and depth before anything is built: libyaml builds by recursion in C, without a limit."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _too_deep(path)
        line = f"{path}, line {event.start_mark.line + 1}" if event.start_mark else path
        if (tag := getattr(event, "tag", None)) and tag != "!":
            raise FileError(f"{line}: has the tag {tag!r}; only plain values are read")
        if isinstance(event, yaml.AliasEvent) and not aliases:
            raise FileError(f"{line}: has the alias *{event.anchor}; write the value out")


def _check_plain(content: Any, where: object) -> None:
    """Refuse what is nested deep, and values that are neither text nor number nor true, false, null."""
    level = [content]
    for _ in range(MAX_DEPTH):
        branches = [value for value in level if type(value) in _BRANCHES]
        for value in level:
            if type(value) not in _LEAVES + _BRANCHES:
                raise FileError(f"{where}: holds {value!s:.40} ({type(value).__name__}); put it in quotes")
            if type(value) is int and not -MAX_INTEGER <= value < MAX_INTEGER:
                raise FileError(f"{where}: holds a whole number of more than 64 bits")
        if not branches:
            return
        keys = [key for branch in branches if isinstance(branch, dict) for key in branch]
        if odd := next((key for key in keys if type(key) not in (str, int)), None):
            raise FileError(f"{where}: has the key {odd!s:.40} ({type(odd).__name__}); put it in quotes")
        level = [v for branch in branches for v in (branch.values() if isinstance(branch, dict) else branch)]
    raise _too_deep(where)


def _too_deep(where: object) -> FileError:
    return FileError(f"{where}: lists and mappings lie more than {MAX_DEPTH} deep in each other")


def _unreadable(where: object, error: BaseException) -> FileError:
    if isinstance(error, FileError):
        return error
    return FileError(f"{where} cannot be read ({' '.join(str(error).split())[:200]})")
