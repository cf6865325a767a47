"""Rules between the keys of `jepa-embed` and `jepa-predict`. Without torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from jepa.config.heads import BOXES, head_of, stored_config
from jepa.config.paths import existing
from jepa.config.view import ConfigView, Rule

FEATURE_FILES = (".parquet", ".npz", ".safetensors")
TABLE_HEAD = "name,class,"
"""Beginning of the first line of a table of predictions."""


def _inputs(view: ConfigView) -> Iterator[str]:
    """The run, and exactly one of images, videos and dataset exist; none of these where features are only searched."""
    embeds = "neighbours" in view
    if not view.needs_data or (not embeds and "min_score" not in view):
        return
    names = ["images", "videos", *(["dataset"] if embeds else [])]
    given = [name for name in names if name in view or any(key.startswith(f"{name}.") for key in view)]
    if len(given) > 1:
        yield f"{' and '.join(given)}: give one of them"
    if not given and "like" not in view:
        yield f"{', '.join(names[:-1])} or {names[-1]}: one must be given, as images=FOLDER"
    for name in (name for name in ("images", "videos", "like") if name in view):
        try:
            existing(Path(view[name]).expanduser().absolute(), view.describe(name))
        except ValueError as error:
            yield f"{error}"
    try:
        stored_config(view["run"])
    except ValueError as error:
        yield f"{view.describe('run')}: {error}"


def _feature_file(view: ConfigView) -> Iterator[str]:
    """The suffix names a format whose package is there; what is searched is pooled."""
    if "neighbours" not in view:
        return
    key, path = view.describe("out"), Path(view["out"]).expanduser()
    if path.suffix not in FEATURE_FILES:
        yield f"{key}: takes a file that ends in {', '.join(FEATURE_FILES[:-1])} or {FEATURE_FILES[-1]}"
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        yield f"{key}: parquet files need pyarrow: pip install 'jepa-train[parquet]', or give a file that ends in .npz"
    if path.is_dir():
        yield f"{key}: is a folder; give a file"
    if "like" in view and view["readout"] == "all":
        yield f"{view.describe('like', 'readout')}: neighbours are found by one vector a file; use readout=mean"
    if "page" in view and "like" not in view:
        yield f"{view.describe('page')}: shows the neighbours of a picture; give like=PICTURE"


def _predicted_table(view: ConfigView) -> Iterator[str]:
    if "min_score" not in view:
        return
    key, path = view.describe("out"), Path(view["out"]).expanduser()
    if path.suffix != ".csv" or path.is_dir():
        yield f"{key}: takes a file that ends in .csv"
    elif path.is_file() and not _first_line(path).startswith(TABLE_HEAD):
        yield f"{key}: is no table of predictions; give another file, or remove it"


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline(200)


def _head(view: ConfigView) -> Iterator[str]:
    """The run has a head that predicts something."""
    if "min_score" not in view:
        return
    run, head = view["run"], ""
    with suppress(ValueError):  # reported by `_inputs`
        if not (head := head_of(stored_config(run))):
            advice = f"fine-tune it with labels: jepa-finetune run={run} name=tuned, then run=outputs/tuned"
            yield f"{view.describe('run')}: has no head that predicts classes or boxes; {advice}"
    if head == BOXES and "videos" in view:
        yield f"{view.describe('videos')}: a detector takes images"


USE_RULES: tuple[Rule, ...] = (_inputs, _feature_file, _predicted_table, _head)
