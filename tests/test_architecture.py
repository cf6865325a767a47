"""Reads the source with `ast` and holds what the design promises about it: direction of imports, sizes, habits."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "jepa"
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text()) for path in FILES}

# Bottom to top: a module imports from the levels below its own, and from its own folder. "masks/geometry" is one file
# that lies below the rest of its folder.
LEVELS = (
    {"types", "errors", "seeding", "suggestions", "optim"},
    {
        "schedules",
        "evaluation/types",
        "masks/geometry",
        "parallel/environment",
        "parallel/signals",
        "resources/hardware",
    },
    {"config"},
    {"parallel", "logger", "schedules", "envs"},
    {"layers", "data", "masks", "runs"},
    {"encoders", "predictors", "regularizers", "reports"},
    {"objectives", "evaluation"},
    {"training", "benchmark", "exporters", "planning"},
    {"comparison", "resources", "inference"},
    {"agent"},
    {"worlds", "rl"},
    {"cli"},
)
LEVEL = {part: number for number, parts in enumerate(LEVELS) for part in parts}
# One file is one choice of the group; of its own folder it imports only these files, which the choices share.
SHARED = {
    "encoders": {"names", "nodes", "published"},
    "predictors": set(),
    "masks": {"geometry", "sampling"},
    "objectives": {"base", "reconstruction", "rules"},
    "regularizers": {"pooling", "rules"},
    "evaluation": {
        "types",
        "samples",
        "splits",
        "frozen",
        "snapshot",
        "box_snapshot",
        "probe",
        "pictures",
        "readout",
        "stems",
    },
}
ONE_HOME = {
    "hydra": ("config/", "agent.py", "cli/"),
    "omegaconf": ("config/", "agent.py", "cli/"),
    "torch.distributed": ("parallel/", "runs/checkpoint.py"),
    "gymnasium": ("envs/",),
    "stable_baselines3": ("rl/",),
    "wandb": ("logger.py",),
    "jinja2": ("reports/page.py",),
    "tqdm": ("parallel/bars.py", "training/progress.py", "training/run.py"),
}
WITHOUT_TORCH = (
    "jepa",
    "jepa.types",
    "jepa.schedules",
    "jepa.config",
    "jepa.reports.run",
    "jepa.cli.train",
    "jepa.cli.eval",
    "jepa.cli.embed",
    "jepa.cli.predict",
    "jepa.cli.collect",
    "jepa.data.collect",
    "jepa.comparison.plan",
    "jepa.cli.compare",
    "jepa.cli.rl",
    "jepa.cli.play",
)
WITHOUT_JINJA = tuple(name for name in WITHOUT_TORCH if name != "jepa.reports.run")
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match, ast.AsyncFor, ast.AsyncWith)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that is imported, also inside functions; relative imports are refused elsewhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, FUNCTIONS))


def part_of(path: str) -> str:
    """encoders/spatial.py -> encoders; agent.py -> agent"""
    return path.split("/")[0].removesuffix(".py")


def level_of(path: str) -> int | None:
    """Of a file, else of its folder."""
    return LEVEL.get(path.removesuffix(".py"), LEVEL.get(part_of(path)))


def file_of(name: str) -> str:
    """jepa.masks.geometry.Shape -> masks/geometry.py; what no file holds by itself lies in the package's __init__."""
    parts = name.split(".")[1:]
    return next(
        (path for n in range(len(parts), 0, -1) if (path := "/".join(parts[:n]) + ".py") in TREES),
        f"{parts[0]}/__init__.py",
    )


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def nesting(statements: list[ast.stmt]) -> int:
    """Blocks inside one another; an `elif` counts as its `if`, and a function inside starts anew."""
    deepest = 0
    for statement in statements:
        if isinstance(statement, BLOCKS):
            deepest = max(deepest, 1 + nesting(children(statement)), *(nesting([e]) for e in elifs(statement)))
    return deepest


def elifs(statement: ast.stmt) -> list[ast.stmt]:
    return statement.orelse if isinstance(statement, ast.If) and is_elif(statement) else []


def is_elif(statement: ast.If) -> bool:
    return len(statement.orelse) == 1 and isinstance(statement.orelse[0], ast.If)


def children(statement: ast.stmt) -> list[ast.stmt]:
    if isinstance(statement, ast.Match):
        return [inner for case in statement.cases for inner in case.body]
    if isinstance(statement, ast.Try):
        handlers = [inner for handler in statement.handlers for inner in handler.body]
        return statement.body + handlers + statement.orelse + statement.finalbody
    if isinstance(statement, ast.If):
        return statement.body if is_elif(statement) else statement.body + statement.orelse
    return statement.body + getattr(statement, "orelse", [])


def test_imports_point_downwards() -> None:
    faults = []
    for path, tree in TREES.items():
        own = level_of(path)
        if path == "__init__.py":
            continue
        assert own is not None, f"{path}: not part of the layering; give it a level in {Path(__file__).name}"
        for line, name in imports(tree):
            if not inside(name, "jepa") or name == "jepa":
                continue
            other = file_of(name)
            level = level_of(other)
            if part_of(other) != part_of(path) and (level is None or level >= own):
                faults.append(f"{path}:{line} imports {name}")
    assert not faults


def test_hall_and_layering_stay_small() -> None:
    assert len([path for path in TREES if "/" not in path]) <= 10
    assert len(LEVELS) <= 12


def test_components_of_a_group_import_only_what_their_folder_shares() -> None:
    faults = []
    for path, tree in TREES.items():
        for line, name in imports(tree):
            group = part_of(path)
            if group not in SHARED or not inside(name, f"jepa.{group}"):
                continue
            if file_of(name).removeprefix(f"{group}/").removesuffix(".py") not in SHARED[group]:
                faults.append(f"{path}:{line} imports {name}")
    assert not faults


def test_shared_files_exist_and_are_no_choice() -> None:
    targets = {node["_target_"] for path in CONF_FILES for node in components(yaml.safe_load(path.read_text()))}
    files = {f"{group}/{name}.py" for group, names in SHARED.items() for name in names}
    assert files <= set(TREES)
    assert not files & {file_of(target) for target in targets}


def test_no_relative_imports() -> None:
    assert not [
        f"{path}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]


@pytest.mark.parametrize("package", ONE_HOME)
def test_package_is_imported_only_in_its_home(package: str) -> None:
    faults = [
        f"{path}:{line}"
        for path, tree in TREES.items()
        for line, name in imports(tree)
        if inside(name, package) and not path.startswith(ONE_HOME[package])
    ]
    assert not faults


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "packages"), [(WITHOUT_TORCH, {"torch", "timm", "wandb"}), (WITHOUT_JINJA, {"jinja2"})]
)
def test_configuration_side_is_imported_without(names: tuple[str, ...], packages: set[str]) -> None:
    program = "; ".join(f"import {name}" for name in names)
    check = f"import sys; heavy = {packages} & set(sys.modules); assert not heavy, heavy"
    result = subprocess.run([sys.executable, "-c", f"{program}; {check}"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_source_stays_small() -> None:
    lengths = {path.relative_to(SOURCE).as_posix(): path.read_text().count("\n") for path in FILES}
    assert not {path: length for path, length in lengths.items() if length > 400}
    assert sum(lengths.values()) < 39_000
    assert not {p: n for p, n in lengths.items() if p.startswith("cli/") and n > 125}


def test_every_folder_of_tests_has_quick_ones() -> None:
    folders = {path.parent for path in (ROOT / "tests").glob("*/test_*.py")}
    quick = {path.parent for path in (ROOT / "tests").glob("*/test_*.py") if "\npytestmark" not in path.read_text()}
    assert folders == quick


def test_functions_stay_small_and_flat() -> None:
    faults = []
    for path, tree in TREES.items():
        for function in functions(tree):
            length = (function.end_lineno or 0) - function.lineno + 1
            if length > 60:
                faults.append(f"{path}:{function.lineno} {function.name}: {length} lines")
            if nesting(function.body) > 3:
                faults.append(f"{path}:{function.lineno} {function.name}: nested {nesting(function.body)} deep")
    assert not faults


def test_only_four_inits_have_content() -> None:
    filled = [path for path in TREES if path.endswith("__init__.py") and TREES[path].body]
    assert filled == ["__init__.py", "cli/__init__.py", "config/__init__.py", "rl/__init__.py"]


def test_no_error_is_swallowed_unnamed() -> None:
    faults = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            names = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else {"bare"}
            if names & {"bare", "Exception", "BaseException"}:
                faults.append(f"{path}:{node.lineno}")
    assert not faults


def test_no_module_keeps_state() -> None:
    assert not [f"{p}:{n.lineno}" for p, tree in TREES.items() for n in ast.walk(tree) if isinstance(n, ast.Global)]


def test_nothing_in_the_step_waits_for_the_device() -> None:
    faults = []
    for path, tree in TREES.items():
        if part_of(path) not in {"encoders", "predictors", "objectives", "regularizers"}:
            continue
        for function in functions(tree):
            for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
                method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
                to_float = isinstance(call.func, ast.Name) and call.func.id == "float" and function.name != "__init__"
                if method in {"item", "cpu", "tolist", "numpy"} or to_float:
                    faults.append(f"{path}:{call.lineno} {ast.unparse(call)}")
    assert not faults


def test_constructors_of_components_are_keyword_only_without_kwargs() -> None:
    faults = []
    for path, tree in TREES.items():
        if part_of(path) not in SHARED:
            continue
        for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            for init in (node for node in cls.body if isinstance(node, FUNCTIONS) and node.name == "__init__"):
                public = not cls.name.startswith("_")
                if public and (len(init.args.args) > 1 or init.args.vararg or init.args.kwarg):
                    faults.append(f"{path}:{init.lineno} {cls.name}")
    assert not faults


def test_nothing_is_left_unfinished() -> None:
    words = re.compile(r"\b(TODO|FIXME|XXX)\b")
    files = [*FILES, *(ROOT / "conf").rglob("*.yaml"), *(ROOT / "scripts").iterdir()]
    assert not [path for path in files if path.is_file() and words.search(path.read_text())]


def test_nine_of_ten_functions_are_under_thirty_lines() -> None:
    every = [function for tree in TREES.values() for function in functions(tree)]
    short = sum((function.end_lineno or 0) - function.lineno < 30 for function in every)
    assert short >= 0.9 * len(every)


@pytest.mark.parametrize(
    ("source", "depth"),
    [
        ("x = 1", 0),
        ("if a:\n  x = 1\nelif b:\n  x = 2\nelse:\n  x = 3", 1),
        ("for a in b:\n  with c:\n    x = 1", 2),
        ("try:\n  x = 1\nexcept E:\n  if a:\n    while b:\n      x = 2", 3),
        ("if a:\n  x = 1\nelif b:\n  for c in d:\n    x = 2", 2),
    ],
)
def test_nesting_is_counted_in_blocks(source: str, depth: int) -> None:
    assert nesting(ast.parse(source).body) == depth


# What Python hands to a component (the parts of the run, and sizes derived from them) and YAML therefore never says.
OF_DATA = {"classes", "fields"}
WIRED = {
    "encoder": {"clip_shape"},
    "mask": {"grid"},
    "predictor": {"grid", "embed_dim", "num_mask_tokens", "fields"},
    "dataset": {"num_frames"},
    "objective": {"encoder", "predictor", "regularizers", "num_mask_tokens", *OF_DATA, "batch_size", "total_steps"},
    "schedule": {"total_steps", "steps_per_epoch", "lr"},
    "logger": {"folder", "config", "run_id", "resume_step"},
}
SIZE_KEYS = {"embed_dim", "depth", "num_heads"}
CONF_FILES = sorted((ROOT / "conf").glob("*/*.yaml"))
COMPONENT_FILES = [path for path in CONF_FILES if "_target_: jepa." in path.read_text()]


def file_id(path: Path) -> str:
    return path.relative_to(ROOT / "conf").as_posix()


def components(node: Any) -> Iterator[dict[str, Any]]:
    """Every mapping with a `_target_` of ours, at any depth."""
    if isinstance(node, dict):
        if str(node.get("_target_", "")).startswith("jepa."):
            yield node
        for value in node.values():
            yield from components(value)


def signature(target: str) -> tuple[set[str], set[str]]:
    """All and the required argument names of a constructor, from the imported class."""
    module, _, name = target.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    return set(parameters), {key for key, value in parameters.items() if value.default is value.empty}


@pytest.mark.parametrize("path", CONF_FILES, ids=file_id)
def test_configuration_file_says_what_it_is(path: Path) -> None:
    comments = [line for line in path.read_text().splitlines()[:2] if line.startswith("# ")]
    assert any(not line.startswith("# @package") for line in comments), "the file starts with a comment line"


@pytest.mark.parametrize("path", COMPONENT_FILES, ids=file_id)
def test_configuration_file_fits_its_constructor(path: Path) -> None:
    group = path.parent.name
    for node in components(yaml.safe_load(path.read_text())):
        every, required = signature(node["_target_"])
        wired = WIRED.get(group, set())
        sized = group == "encoder" and not every.isdisjoint(SIZE_KEYS)  # else its weights tell the sizes
        given = set(node) - {"_target_"} | (SIZE_KEYS if sized else set())
        assert given <= every, "a key that the constructor does not take"
        assert not given & wired, "a key that Python hands over"
        assert required <= given | wired, "a required argument without a value"
        assert every <= given | wired, "an argument that no key reaches"


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "experiment").glob("*.yaml")), ids=file_id)
def test_experiment_starts_with_its_command(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if not line.startswith("# @package")][:1]
    assert head[0].startswith((f"# jepa-train experiment={path.stem}", f"# jepa-plan experiment={path.stem}"))
