"""What a constructor takes, read from its source with `ast`: importing it would import torch."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jepa import types
from jepa.suggestions import suggestion
from jepa.types import Within

PLAIN = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "None": "null"}
LISTS = {"list", "tuple", "Sequence", "List", "Tuple"}
DICTS = {"dict", "Mapping", "Dict"}


@dataclass(frozen=True)
class Parameter:
    name: str
    annotation: ast.expr | None
    default: ast.expr | None

    @property
    def is_required(self) -> bool:
        return self.default is None

    def has_default(self, value: Any) -> bool:
        """Whether `value`, as YAML gives it, is the default; no other than a literal one is known."""
        try:
            default = ast.literal_eval(self.default) if self.default is not None else ...
        except ValueError:
            return False
        return (list(default) if isinstance(default, tuple) else default) == value


@dataclass(frozen=True)
class Signature:
    name: str
    parameters: dict[str, Parameter]
    takes_more: bool
    """whether it has **kwargs"""


def fault(annotation: ast.expr | None, name: str, value: Any) -> str | None:
    """Why a value from YAML cannot be passed as the argument `name`, as the end of a sentence; None where it can."""
    if fits(annotation, value):
        return None
    if broken := _broken_bounds(annotation, value):
        return broken
    words = [word for word in _words(annotation) if isinstance(word, str)]
    if words and isinstance(value, str):
        return f"no such {name}{suggestion(value, words)}; valid: {', '.join(words)}"
    return f"takes {describe(annotation)}, not {show(value)}"


def fits(annotation: ast.expr | None, value: Any) -> bool:
    """Whether a value from YAML can be passed; what the annotation does not say plainly is let through."""
    match _resolved(annotation):
        case ast.Constant(value=None):
            return value is None
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return fits(left, value) or fits(right, value)
        case ast.Name(id=name) if name in PLAIN or name in LISTS or name in DICTS:
            return _fits_name(name, value)
        case ast.Call(func=ast.Name(id="Within")) as call:
            return value in _bounds(call)
        case ast.Subscript(value=ast.Name(id=name), slice=inner):
            return _fits_generic(name, inner.elts if isinstance(inner, ast.Tuple) else [inner], value)
    return True


def describe(annotation: ast.expr | None) -> str:
    """The annotation in the words of a message: "a whole number or null"."""
    match resolved := _resolved(annotation):
        case ast.Constant(value=None):
            return "null"
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return f"{describe(left)} or {describe(right)}"
        case ast.Name(id=name) if name in PLAIN:
            return PLAIN[name]
        case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[plain, extra])):
            return describe(plain if isinstance(extra, ast.Call) else extra)
        case ast.Subscript(value=ast.Name(id="Literal")):
            return " or ".join(map(str, _words(resolved)))
        case ast.Subscript(value=ast.Name(id=name), slice=inner) if name in LISTS:
            return f"a list of {_describe_items(inner)}"
    return ast.unparse(resolved) if resolved else "anything"


@cache
def read(target: str) -> Signature | None:
    """The constructor behind a `_target_`; None when its source says nothing (compiled, built at run time).

    Raises LookupError with a sentence when there is no such module or name.
    """
    found = _find(target)
    if found is None:
        return None
    parameters, takes_more = _parameters_of(*found)
    return None if parameters is None else Signature(found[0].name, {p.name: p for p in parameters}, takes_more)


@cache
def traits(target: str) -> dict[str, Any]:
    """The literals in the body of a class and of its first bases, by name; empty where the source says nothing.

    With them a component says what it needs and which rules hold for it; of a dict that is no literal the keys count.
    Classes of torch say nothing of this, and the files of their bases are long.
    """
    if target.startswith("torch."):
        return {}
    try:
        found = _find(target)
    except LookupError:
        return {}
    return _literals(*found) if found else {}


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


@cache
def _aliases() -> dict[str, ast.expr]:
    """The annotations that `jepa.types` gives a name, as `PositiveInt`."""
    nodes = [node for node in _tree(Path(types.__file__)).body if isinstance(node, ast.Assign)]
    return {ast.unparse(node.targets[0]): node.value for node in nodes if "Annotated" in ast.unparse(node.value)}


@cache
def parsed(text: str) -> ast.expr:
    """The annotation in a text."""
    return ast.parse(text, mode="eval").body


def _resolved(annotation: ast.expr | None) -> ast.expr | None:
    """Without quotes, and an alias written out."""
    match annotation:
        case ast.Constant(value=str(text)):
            return _resolved(parsed(text))
        case ast.Name(id=name):
            return _aliases().get(name, annotation)
    return annotation


def _bounds(call: ast.Call) -> Within:
    named = {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in call.keywords}
    return Within(*map(ast.literal_eval, call.args), **named)


def _broken_bounds(annotation: ast.expr | None, value: Any) -> str | None:
    """What a value of the right type must be, where it is out of the bounds of an annotation."""
    match _resolved(annotation):
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _broken_bounds(left, value) or _broken_bounds(right, value)
        case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[plain, ast.Call() as call])):
            if not fits(plain, value) or fits(call, value):
                return None
            if isinstance(value, list | tuple):
                return f"must be two numbers, the smaller first, {_bounds(call)}"
            return "must not be negative" if _bounds(call) == Within(0) else f"must be {_bounds(call)}"
        case ast.Subscript(value=ast.Name(id=name), slice=inner) if name in LISTS and isinstance(value, list | tuple):
            item = inner.elts[0] if isinstance(inner, ast.Tuple) else inner
            broken = (_broken_bounds(item, part) for part in value)
            return next((f"each {sentence}" for sentence in broken if sentence), None)
    return None


def _words(annotation: ast.expr | None) -> list[Any]:
    """All that the literals in an annotation offer."""
    match _resolved(annotation):
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _words(left) + _words(right)
        case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[_, extra])):
            return _words(extra)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            return [ast.literal_eval(word) for word in (inner.elts if isinstance(inner, ast.Tuple) else [inner])]
    return []


def show(value: Any) -> str:
    """A value of the wrong type, in a message."""
    if isinstance(value, str):
        return f"the text {value!r}"
    return "null" if value is None else f"{str(value).lower() if isinstance(value, bool) else value}"


def _fits_name(name: str, value: Any) -> bool:
    if name in LISTS:
        return isinstance(value, list | tuple)
    if name in DICTS:
        return isinstance(value, dict)
    if name == "bool" or isinstance(value, bool):
        return name == "bool" and isinstance(value, bool)
    return isinstance(value, {"int": int, "float": (int, float), "str": str, "None": type(None)}[name])


def _fits_generic(name: str, inner: list[ast.expr], value: Any) -> bool:
    if name == "Literal":
        return any(value == ast.literal_eval(option) for option in inner)
    if name == "Annotated":
        return all(fits(part, value) for part in inner)
    if name in ("Optional", "Union"):
        return (name == "Optional" and value is None) or any(fits(option, value) for option in inner)
    if name in DICTS:
        return isinstance(value, dict) and all(all(map(fits, inner, item)) for item in value.items())
    if name not in LISTS:
        return True
    if not isinstance(value, list | tuple):
        return False
    if name.lower() == "tuple" and not _is_ellipsis(inner[-1]):
        return len(value) == len(inner) and all(map(fits, inner, value))
    return all(fits(inner[0], item) for item in value)


def _describe_items(inner: ast.expr) -> str:
    if isinstance(inner, ast.Tuple) and not _is_ellipsis(inner.elts[-1]):
        return f"{len(inner.elts)}: {', '.join(describe(item) for item in inner.elts)}"
    item = describe(inner.elts[0] if isinstance(inner, ast.Tuple) else inner)
    return item.removeprefix("a ").replace("number", "numbers")


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is Ellipsis


def _module_of(parts: list[str]) -> tuple[Path | None, list[str]]:
    """The file of the longest prefix that is a module, and the names that are left."""
    spec = importlib.util.find_spec(parts[0])
    if spec is None:
        raise LookupError(f"there is no package {parts[0]!r} in this environment")
    if not spec.submodule_search_locations:
        return (Path(spec.origin) if spec.origin else None), parts[1:]
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    for number, part in enumerate(parts[1:], start=1):
        module = _submodule(folders, part)
        if module is None:
            return _submodule(folders, "__init__"), parts[number:]
        if module.name != "__init__.py":
            return module, parts[number + 1 :]
        folders = [module.parent]
    raise LookupError(f"{'.'.join(parts)} is a module, not a class or function")


def _submodule(folders: list[Path], name: str) -> Path | None:
    for folder in folders:
        candidates = (folder / f"{name}.py", folder / name / "__init__.py", *folder.glob(f"{name}.*.so"))
        found = next((path for path in candidates if path.is_file()), None)
        if found:
            return found
    return None


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _definition(path: Path, name: str) -> tuple[ast.ClassDef | ast.FunctionDef, Path] | None:
    """The class or function called `name` in a module, followed through its imports; None when it is made otherwise."""
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
    if node.level:
        folder = path.parents[node.level - 1]
        for part in (node.module or "").split(".")[:-1]:
            folder = folder / part
        return _submodule([folder], (node.module or "__init__").rpartition(".")[2])
    try:
        module, rest = _module_of([*(node.module or "").split("."), "_"])
    except LookupError:
        return None
    return module if rest == ["_"] else None


def _parameters_of(node: ast.ClassDef | ast.FunctionDef, path: Path) -> tuple[list[Parameter] | None, bool]:
    if isinstance(node, ast.FunctionDef):
        return _arguments(node, skip=0)
    init = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
    if init is not None:
        return _arguments(init, skip=1)
    inherited = _inherited(node, path)
    if not _is_dataclass(node):
        return inherited if node.bases else ([], False)
    own = [
        _field(item) for item in node.body if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item)
    ]
    fields = {parameter.name: parameter for parameter in [*(inherited[0] or []), *own]}
    return list(fields.values()), inherited[1]


def _inherited(node: ast.ClassDef, path: Path) -> tuple[list[Parameter] | None, bool]:
    base = _base(node, path)
    return _parameters_of(*base) if base else (None, False)


def _base(node: ast.ClassDef | ast.FunctionDef, path: Path) -> tuple[ast.ClassDef | ast.FunctionDef, Path] | None:
    if isinstance(node, ast.FunctionDef) or not node.bases or not isinstance(node.bases[0], ast.Name):
        return None
    with suppress(LookupError):
        return _definition(path, node.bases[0].id)


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _field(node: ast.AnnAssign) -> Parameter:
    assert isinstance(node.target, ast.Name)
    return Parameter(node.target.id, node.annotation, node.value)


def _arguments(node: ast.FunctionDef, skip: int) -> tuple[list[Parameter], bool]:
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [*[None] * (len(plain) - len(arguments.defaults)), *arguments.defaults]
    positional = [Parameter(a.arg, a.annotation, default) for a, default in zip(plain, defaults, strict=True)][skip:]
    keyword = [
        Parameter(a.arg, a.annotation, default)
        for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return positional + keyword, arguments.kwarg is not None
