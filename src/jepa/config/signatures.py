"""What a constructor takes, read from its source with `ast`: importing it would import torch."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jepa.suggestions import suggestion

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


def fits(annotation: ast.expr | None, value: Any) -> bool:
    """Whether a value from YAML can be passed; what the annotation does not say plainly is let through."""
    match annotation:
        case ast.Constant(value=str(text)):
            return fits(ast.parse(text, mode="eval").body, value)
        case ast.Constant(value=None):
            return value is None
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return fits(left, value) or fits(right, value)
        case ast.Name(id=name) if name in PLAIN or name in LISTS or name in DICTS:
            return _fits_name(name, value)
        case ast.Subscript(value=ast.Name(id=name), slice=inner):
            return _fits_generic(name, inner.elts if isinstance(inner, ast.Tuple) else [inner], value)
    return True


def describe(annotation: ast.expr | None) -> str:
    """The annotation in the words of a message: "a whole number or null"."""
    match annotation:
        case ast.Constant(value=str(text)):
            return describe(ast.parse(text, mode="eval").body)
        case ast.Constant(value=None):
            return "null"
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return f"{describe(left)} or {describe(right)}"
        case ast.Name(id=name) if name in PLAIN:
            return PLAIN[name]
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            options = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return " or ".join(str(ast.literal_eval(option)) for option in options)
        case ast.Subscript(value=ast.Name(id=name), slice=inner) if name in LISTS:
            return f"a list of {_describe_items(inner)}"
    return ast.unparse(annotation) if annotation else "anything"


@cache
def read(target: str) -> Signature | None:
    """The constructor behind a `_target_`; None when its source says nothing (compiled, built at run time).

    Raises LookupError with a sentence when there is no such module or name.
    """
    path, names = _module_of(target.split("."))
    if path is None or path.suffix != ".py":
        return None
    if len(names) > 1 and not any(names[0] in _bound(node) for node in _statements(_tree(path))):
        raise LookupError(f"there is no module {target.rpartition('.')[0]}")
    found = _definition(path, names[0]) if len(names) == 1 else None
    if found is None:
        return None
    node, home = found
    parameters, takes_more = _parameters_of(node, home)
    return None if parameters is None else Signature(node.name, {p.name: p for p in parameters}, takes_more)


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
    if name in ("Optional", "Union"):
        return (name == "Optional" and value is None) or any(fits(option, value) for option in inner)
    if name in DICTS:
        return isinstance(value, dict)
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
    if not node.bases or not isinstance(node.bases[0], ast.Name):
        return None, False
    name = node.bases[0].id
    try:
        found = _definition(path, name)
    except LookupError:
        return None, False
    return _parameters_of(*found) if found else (None, False)


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
