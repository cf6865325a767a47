"""Parameters of constructors, read from their source with `ast`: importing the source would import torch."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from jepa import types
from jepa.suggestions import suggestion
from jepa.types import Within

SCALARS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
SEQUENCES = (list, tuple, Sequence)
UNIONS = (Union, UnionType)


class _Names(dict[str, Any]):
    """Names that annotations may use; any other name stands for a class that every value fits."""

    def __missing__(self, name: str) -> type:
        return type(name, (), {})


NAMES = _Names(vars(builtins) | vars(typing) | vars(types))


@dataclass(frozen=True)
class Parameter:
    name: str
    type: Any
    default: ast.expr | None

    @property
    def is_required(self) -> bool:
        return self.default is None

    def has_default(self, value: Any) -> bool:
        """True if `value`, as YAML gives it, equals the default; False for a default that is no literal."""
        try:
            default = ast.literal_eval(self.default) if self.default is not None else ...
        except ValueError:
            return False
        return (list(default) if isinstance(default, tuple) else default) == value


@dataclass(frozen=True)
class Signature:
    name: str
    parameters: dict[str, Parameter]
    has_kwargs: bool

    def accepts(self, name: str) -> bool:
        return self.has_kwargs or name in self.parameters


def value_error(kind: Any, name: str, value: Any) -> str | None:
    """The end of a sentence on why `value` cannot be passed as the argument `name` of type `kind`; None if it can."""
    if fits(kind, value):
        return None
    if error := _bounds_error(kind, value):
        return error
    words = [choice for choice in _choices(kind) if isinstance(choice, str)]
    if words and isinstance(value, str):
        valid = (choice if isinstance(choice, str) else describe_value(choice) for choice in _choices(kind))
        return f"no such {name}{suggestion(value, words)}; valid: {', '.join(valid)}"
    return f"takes {describe(kind)}, not {describe_value(value)}"


def annotated_type(annotation: ast.expr | str | None) -> Any:
    """The type that an annotation stands for; Any if there is none, or if it cannot be evaluated without imports."""
    text = ast.unparse(annotation) if isinstance(annotation, ast.expr) else annotation
    try:
        kind = eval(text or "Any", {}, NAMES)
    except (AttributeError, TypeError, SyntaxError):
        return Any
    return annotated_type(kind) if isinstance(kind, str) else kind


def _parts(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """`list[int]` -> (list, (int,)); `int` -> (int, ())"""
    return (NoneType if kind is None else get_origin(kind) or kind), get_args(kind)


def fits(kind: Any, value: Any) -> bool:
    """True if a value from YAML can be passed for this type; a type that YAML does not know takes any value."""
    origin, arguments = _parts(kind)
    if origin in UNIONS:
        return any(fits(option, value) for option in arguments)
    if origin is Annotated:
        return all(value in part if isinstance(part, Within) else fits(part, value) for part in arguments)
    if origin is Literal:
        return value in arguments
    if origin in (dict, Mapping):
        return isinstance(value, dict) and (not arguments or all(all(map(fits, arguments, i)) for i in value.items()))
    if origin in SCALARS:
        accepted = (int, float) if origin is float else origin
        return isinstance(value, accepted) and (origin is bool or not isinstance(value, bool))
    if origin not in SEQUENCES:
        return True
    if not isinstance(value, list | tuple):
        return False
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return len(value) == len(arguments) and all(map(fits, arguments, value))
    return all(fits(arguments[0], item) for item in value) if arguments else True


def describe(kind: Any) -> str:
    """The type in the words of a message: "a whole number or null"."""
    origin, arguments = _parts(kind)
    if origin in SCALARS:
        return SCALARS[origin]
    if origin in UNIONS:
        return " or ".join(map(describe, arguments))
    if origin is Annotated:
        return describe(arguments[0] if isinstance(arguments[1], Within) else arguments[1])
    if origin is Literal:
        return " or ".join(word if isinstance(word, str) else describe_value(word) for word in arguments)
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)}: {', '.join(map(describe, arguments))}"
    if origin in SEQUENCES and arguments:
        return f"a list of {describe(arguments[0]).removeprefix('a ').replace('number', 'numbers')}"
    return getattr(kind, "__name__", str(kind))


def describe_value(value: Any) -> str:
    """A value of the wrong type, in a message."""
    if isinstance(value, str):
        return f"the text {value!r}"
    return "null" if value is None else f"{str(value).lower() if isinstance(value, bool) else value}"


def _bounds_error(kind: Any, value: Any) -> str | None:
    """What a value of the right type must be, if it is out of the bounds of its annotation."""
    origin, arguments = _parts(kind)
    if origin in UNIONS:
        return next(filter(None, (_bounds_error(option, value) for option in arguments)), None)
    if origin in SEQUENCES and arguments and isinstance(value, list | tuple):
        errors = (_bounds_error(arguments[0], item) for item in value)
        return next((f"each {error}" for error in errors if error), None)
    if origin is not Annotated:
        return None
    if not isinstance(bounds := arguments[1], Within):
        return _bounds_error(bounds, value)
    if not fits(arguments[0], value) or value in bounds:
        return None
    if isinstance(value, list | tuple):
        return f"must be two numbers, the smaller first, {bounds}"
    return "must not be negative" if bounds == Within(0) else f"must be {bounds}"


def _choices(kind: Any) -> list[Any]:
    """All options of the literals in a type."""
    origin, arguments = _parts(kind)
    if origin is Literal:
        return list(arguments)
    return [choice for part in arguments for choice in _choices(part)] if origin in (*UNIONS, Annotated) else []


@cache
def read(target: str) -> Signature | None:
    """The constructor behind a `_target_`; None if its source cannot be read (compiled, or made at run time).

    Raises LookupError with a sentence if there is no such module or name.
    """
    definition = _find(target)
    signature = _signature(*definition) if definition else None
    return replace(signature, name=definition[0].name) if definition and signature else None


def read_if_known(target: Any) -> Signature | None:
    """As `read`, but None also if there is no such target."""
    with suppress(LookupError):
        return read(target) if isinstance(target, str) else None


@cache
def traits(target: str) -> dict[str, Any]:
    """Literals in the body of a class and of its first bases, by name; of other dicts the keys; empty if unreadable.

    They declare what a component needs and its rules. Classes of torch declare nothing and have long base classes.
    """
    if target.startswith("torch."):
        return {}
    with suppress(LookupError):
        definition = _find(target)
        return _literals(*definition) if definition else {}
    return {}


def _find(target: str) -> tuple[ast.ClassDef | ast.FunctionDef, Path] | None:
    path, names = _module_of(target.split("."))
    if path is None or path.suffix != ".py":
        return None
    if len(names) > 1 and not any(names[0] in _bound(node) for node in _statements(_tree(path))):
        raise LookupError(f"there is no module {target.rpartition('.')[0]}")
    return _definition(path, names[0]) if len(names) == 1 else None


def _literals(node: ast.ClassDef | ast.FunctionDef, path: Path) -> dict[str, Any]:
    base = _base(node, path)
    values = _literals(*base) if base else {}
    for item in node.body:
        if isinstance(item, ast.Assign | ast.AnnAssign) and item.value is not None:
            name = ast.unparse(item.target if isinstance(item, ast.AnnAssign) else item.targets[0])
            value = ast.Tuple(item.value.keys) if isinstance(item.value, ast.Dict) else item.value  # pyright: ignore
            with suppress(ValueError):
                values[name] = ast.literal_eval(value)
    return values


def _module_of(parts: list[str]) -> tuple[Path | None, list[str]]:
    """The file of the longest prefix that is a module, found without importing any, and the remaining names."""
    spec = importlib.util.find_spec(parts[0])
    if spec is None:
        raise LookupError(f"there is no package {parts[0]!r} in this environment")
    for number, part in enumerate(parts[1:], start=1):
        folders = spec.submodule_search_locations
        module = PathFinder.find_spec(part, folders) if folders else None
        if module is None:
            return (Path(spec.origin) if spec.origin else None), parts[number:]
        spec = module
    raise LookupError(f"{'.'.join(parts)} is a module, not a class or function")


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _definition(path: Path, name: str) -> tuple[ast.ClassDef | ast.FunctionDef, Path] | None:
    """The class or function `name` of a module, followed through its imports; None if it is made in another way."""
    defined, is_open = [], False
    for node in _statements(_tree(path)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            if node.name == name:
                return node, path
            defined.append(node.name)
        elif isinstance(node, ast.ImportFrom) and (alias := _alias(node, name)):
            module, is_star = _imported_module(path, node), alias == "*"
            try:
                return _definition(module, name if is_star else alias) if module else None
            except LookupError:
                is_open = is_open or not is_star
        elif name in _bound(node):
            return None
    if is_open:
        return None
    raise LookupError(f"{path.name} defines no {name!r}{suggestion(name, defined)}")


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    for node in tree.body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from (inner for inner in ast.walk(node) if isinstance(inner, ast.stmt))


def _alias(node: ast.ImportFrom, name: str) -> str | None:
    return next((alias.name for alias in node.names if (alias.asname or alias.name) in (name, "*")), None)


def _bound(node: ast.stmt) -> set[str]:
    """Names that a statement may bind in a way that is not followed."""
    if isinstance(node, ast.ImportFrom | ast.Import):
        return {alias.asname or alias.name for alias in node.names}
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)}


def _imported_module(path: Path, node: ast.ImportFrom) -> Path | None:
    parts = (node.module or "__init__").split(".")
    if node.level:
        spec = PathFinder.find_spec(parts[-1], [str(path.parents[node.level - 1].joinpath(*parts[:-1]))])
        return Path(spec.origin) if spec and spec.origin else None
    try:
        module, names = _module_of([*parts, "_"])
    except LookupError:
        return None
    return module if names == ["_"] else None


def _signature(node: ast.ClassDef | ast.FunctionDef, path: Path) -> Signature | None:
    if isinstance(node, ast.FunctionDef):
        return _from_arguments(node, skip=0)
    init = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
    if init is not None:
        return _from_arguments(init, skip=1)
    base = _base(node, path)
    inherited = _signature(*base) if base else None
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return inherited if node.bases else Signature(node.name, {}, has_kwargs=False)
    fields = (item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name))
    parameters = {
        item.target.id: Parameter(item.target.id, annotated_type(item.annotation), item.value)  # pyright: ignore
        for item in fields if "ClassVar" not in ast.unparse(item)
    }  # fmt: skip
    inherited = inherited or Signature(node.name, {}, has_kwargs=False)
    return replace(inherited, parameters=inherited.parameters | parameters)


def _base(node: ast.ClassDef | ast.FunctionDef, path: Path) -> tuple[ast.ClassDef | ast.FunctionDef, Path] | None:
    if isinstance(node, ast.FunctionDef) or not node.bases or not isinstance(node.bases[0], ast.Name):
        return None
    with suppress(LookupError):
        return _definition(path, node.bases[0].id)


def _from_arguments(node: ast.FunctionDef, skip: int) -> Signature:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [*[None] * (len(positional) - len(arguments.defaults)), *arguments.defaults, *arguments.kw_defaults]
    pairs = list(zip([*positional, *arguments.kwonlyargs], defaults, strict=True))[skip:]
    parameters = {a.arg: Parameter(a.arg, annotated_type(a.annotation), default) for a, default in pairs}
    return Signature(node.name, parameters, arguments.kwarg is not None)
