"""JSON and YAML files that others may have written: read as plain values of bounded size, or refused by name."""

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
"""Largest size of a file, in bytes; annotations of data sets may have any size."""
MAX_DEPTH = 50
"""Largest number of lists and mappings inside each other."""
MAX_INTEGER = 1 << 63
"""Bound of whole numbers, which floats and tensors can hold."""
Fields = Mapping[str, Any]
"""Name of a field -> its type, as in `jepa.config.signatures`; a field may be missing if its type admits None."""
_LEAVES = (str, int, float, bool, type(None))
_BRANCHES = (dict, list)
_ERRORS = (yaml.YAMLError, ValueError, RecursionError)
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_json(path: Path, fields: Fields | None = None, *, max_bytes: int | None = MAX_BYTES) -> dict[str, Any]:
    """The mapping in a JSON file. Raises FileError if it is another value, too deep or large, or `fields` do not fit.

    Without `max_bytes` the depth is not bounded either, and the caller checks every entry.
    """
    content = parse_json(read_bytes(path, max_bytes), path, is_checked=max_bytes is not None)
    return as_mapping(content, path, fields or {})


def read_yaml(path: Path, fields: Fields | None = None, *, aliases: bool = False) -> dict[str, Any]:
    """As `read_json`, of a YAML file. Tags are refused, and aliases unless they are allowed."""
    try:
        text = read_bytes(path, MAX_BYTES).decode("utf-8-sig")
        _check_events(text, path, aliases)
        content = yaml.load(text, Loader=_Loader)
    except _ERRORS as error:
        raise _unreadable(path, error) from error
    _check_plain(content, path)
    return as_mapping(content, path, fields or {})


def parse_json(text: str | bytes, where: object, *, is_checked: bool = True) -> Any:
    """Values of bounded depth. Raises FileError that names `where`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(where, error) from error
    if is_checked:
        _check_plain(content, where)
    return content


def as_mapping(content: Any, where: object, fields: Fields) -> dict[str, Any]:
    """The content, if it is a mapping whose `fields` have values of their types; else FileError."""
    if not isinstance(content, dict):
        raise FileError(f"{where} holds no mapping")
    errors = {name: signatures.value_error(kind, name, content.get(name)) for name, kind in fields.items()}
    if missing := [name for name, error in errors.items() if error and name not in content]:
        raise FileError(f"{where} lacks {', '.join(missing)}")
    if wrong := [f"{name} {error[:200]}" for name, error in errors.items() if error]:
        raise FileError(f"{where}: {'; '.join(wrong)}")
    return content


def read_bytes(path: Path, max_bytes: int | None = MAX_BYTES) -> bytes:
    """The content of a regular file. Raises FileError for anything else and for larger files."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise FileError(f"{path} cannot be read: it is no file")
        if max_bytes is not None and status.st_size > max_bytes:
            raise FileError(f"{path} has {status.st_size:,} bytes: at most {max_bytes:,} are read")
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def exists(path: Path) -> bool:
    """True if there is such a path. Raises FileError if the file system gives no answer."""
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
    """Refuse deep nesting, values other than text, numbers, true, false and null, and large whole numbers."""
    values = [content]
    for _ in range(MAX_DEPTH):
        branches = [value for value in values if type(value) in _BRANCHES]
        for value in values:
            if type(value) not in _LEAVES + _BRANCHES:
                raise FileError(f"{where}: holds {value!s:.40} ({type(value).__name__}); put it in quotes")
            if type(value) is int and not -MAX_INTEGER <= value < MAX_INTEGER:
                raise FileError(f"{where}: holds a whole number of more than 64 bits")
        if not branches:
            return
        keys = [key for branch in branches if isinstance(branch, dict) for key in branch]
        if other := next((key for key in keys if type(key) not in (str, int)), None):
            raise FileError(f"{where}: has the key {other!s:.40} ({type(other).__name__}); put it in quotes")
        values = [v for branch in branches for v in (branch.values() if isinstance(branch, dict) else branch)]
    raise _too_deep(where)


def _too_deep(where: object) -> FileError:
    return FileError(f"{where}: more than {MAX_DEPTH} lists and mappings are nested in each other")


def _unreadable(where: object, error: BaseException) -> FileError:
    if isinstance(error, FileError):
        return error
    return FileError(f"{where} cannot be read ({' '.join(str(error).split())[:200]})")
