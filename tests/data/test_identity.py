"""What a data set consists of: the same after a move, another after any change."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.helpers.tiny_agent import TINY

from jepa import JEPAAgent, JEPAConfig
from jepa.cli.eval import main as eval_main
from jepa.config import ConfigError
from jepa.data.boxes import COCO
from jepa.data.embedded import Shapes
from jepa.data.frames import FrameFolders
from jepa.data.huggingface import HuggingFaceImages
from jepa.data.identity import changes, identity
from jepa.data.images import ImageFolder
from jepa.data.moving_digits import MovingDigits
from jepa.data.shards import Shards
from jepa.evaluation.splits import LabelledSplits, labelled_splits
from jepa.types import Dataset


def pictures(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 4, seed: int = 0) -> Path:
    """Uncompressed pictures, so that other pixels have as many bytes."""
    random = np.random.default_rng(seed)
    for name in classes:
        (folder / "train" / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = random.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "train" / name / f"{number}.bmp")
    return folder


def open_folder(folder: Path) -> ImageFolder:
    return ImageFolder(root_path=str(folder), image_folder="train")


def open_frames(folder: Path) -> FrameFolders:
    return FrameFolders(num_frames=2, root_path=str(folder), image_folder="train", val_ratio=0.0)


@pytest.mark.parametrize("open_data", [open_folder, open_frames])
def test_data_that_were_moved_are_the_same(tmp_path: Path, open_data: Callable[[Path], Dataset]) -> None:
    before = identity(open_data(pictures(tmp_path / "a")))
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b")  # with the time of the copy
    after = identity(open_data(tmp_path / "elsewhere" / "b"))
    assert changes(before, json.loads(json.dumps(after))) == []


@pytest.mark.parametrize("open_data", [open_folder, open_frames])
def test_pictures_replaced_under_the_same_names_are_other_data(
    tmp_path: Path, open_data: Callable[[Path], Dataset]
) -> None:
    before = identity(open_data(pictures(tmp_path)))
    after = identity(open_data(pictures(tmp_path, seed=1)))
    (change,) = changes(before, after)
    assert change.startswith("as many samples, but other contents or labels")


def not_among(positions: int, count: int) -> int:
    """An index that is not among so many evenly spaced ones."""
    spaced = set(np.linspace(0, count - 1, positions).round().astype(int).tolist())
    return next(index for index in range(count) if index not in spaced)


@pytest.mark.parametrize("open_data", [open_folder, open_frames])
def test_one_picture_among_many_that_was_replaced_makes_other_data(
    tmp_path: Path, open_data: Callable[[Path], Dataset]
) -> None:
    before = identity(open_data(pictures(tmp_path, count=130)))
    data = open_data(tmp_path)
    path = Path(data.file(not_among(64, len(data))))  # pyright: ignore[reportAttributeAccessIssue]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    after = identity(open_data(tmp_path))
    assert before["digest"] == after["digest"]
    (change,) = changes(before, after)
    assert change.startswith("as many samples, but some files are others")
    del before["files"]  # as earlier versions saved it
    assert changes(before, after) == []


def test_beyond_the_files_that_are_read_the_size_of_each_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jepa.data.identity.NUM_READ", 10)
    before = identity(open_folder(pictures(tmp_path, count=60)))
    path = Path(open_folder(tmp_path).file(not_among(64, 120)))
    path.write_bytes(path.read_bytes() + b"x")
    assert changes(before, identity(open_folder(tmp_path))) != []


def test_the_digest_of_files_covers_parquet_shards_and_boxes(tmp_path: Path) -> None:
    for number, make in enumerate((parquet, shards, coco)):
        paths = [tmp_path / f"{number}-{version}" for version in range(3)]
        identities = [identity(make(path, changed)) for path, changed in zip(paths, (None, None, 3), strict=True)]
        assert changes(identities[0], identities[1]) == []
        assert changes(identities[0], identities[2]) != []
        assert identities[0]["digest"] == identities[2]["digest"]


def encoded_pictures(count: int, changed: int | None) -> list[bytes]:
    """PNG files; one of them is another."""
    files = []
    for number in range(count):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (number, 0, 255 if number == changed else 0)).save(file, "PNG")
        files.append(file.getvalue())
    return files


def parquet(folder: Path, changed: int | None) -> Dataset:
    folder.mkdir()
    images = [{"bytes": data, "path": None} for data in encoded_pictures(140, changed)]
    pq.write_table(pa.table({"image": images, "label": [number % 2 for number in range(140)]}), folder / "0.parquet")
    return HuggingFaceImages(path=str(folder))


def shards(folder: Path, changed: int | None) -> Dataset:
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number, data in enumerate(encoded_pictures(140, changed)):
            for suffix, content in (("png", data), ("cls", str(number % 2).encode())):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return Shards(shards=str(folder / "0.tar"))


def coco(folder: Path, changed: int | None) -> Dataset:
    """Of one picture a box differs, not the file."""
    folder.mkdir()
    for number, data in enumerate(encoded_pictures(140, None)):
        (folder / f"{number:03d}.png").write_bytes(data)
    sizes = {number: 5 if number == changed else 4 for number in range(140)}
    content = {
        "images": [{"id": n, "file_name": f"{n:03d}.png", "width": 8, "height": 8} for n in sizes],
        "annotations": [{"id": n, "image_id": n, "category_id": 1, "bbox": [0, 0, 4, h]} for n, h in sizes.items()],
        "categories": [{"id": 1, "name": "box"}],
    }
    (folder / "train.json").write_text(json.dumps(content))
    return COCO(root_path=str(folder), images=".", annotations="train.json", val_annotations=None)


def test_numbers_and_classes_are_told_with_both_sides(tmp_path: Path) -> None:
    before = identity(open_folder(pictures(tmp_path)))
    (tmp_path / "train" / "dog").rename(tmp_path / "train" / "wolf")
    assert changes(before, identity(open_folder(tmp_path))) == ["classes (2: cat, dog) then, (2: cat, wolf) now"]
    shutil.rmtree(tmp_path / "train" / "wolf")
    assert changes(before, identity(open_folder(tmp_path)))[0] == "8 samples then, 4 now"


def test_generated_data_are_the_same_with_the_same_settings() -> None:
    for make in (lambda seed: Shapes(num_samples=8, val_samples=4, seed=seed), lambda _: MovingDigits(num_frames=2)):
        assert changes(identity(make(0)), identity(make(0))) == []
    different = [identity(Shapes(num_samples=8, val_samples=4, seed=seed)) for seed in (0, 1)]
    assert changes(*different) != []


def splits(folder: Path) -> LabelledSplits:
    return labelled_splits(open_folder(folder), train_samples=None, test_samples=None, seed=0, num_workers=0)


def test_a_split_has_a_new_version_when_a_file_is_written_and_a_new_digest_when_it_is_another(tmp_path: Path) -> None:
    pictures(tmp_path)
    one = splits(tmp_path)
    assert splits(tmp_path).train.version == one.train.version
    for path in (tmp_path / "train").rglob("*.bmp"):
        os.utime(path, (1, 1))
    touched = splits(tmp_path)
    assert (touched.train.digest, touched.test.digest) == (one.train.digest, one.test.digest)
    assert touched.train.version != one.train.version
    pictures(tmp_path, seed=1)
    assert splits(tmp_path).train.digest != one.train.digest


def test_another_value_of_white_makes_another_version(tmp_path: Path) -> None:
    data, options = pictures(tmp_path), {"train_samples": None, "test_samples": None, "seed": 0, "num_workers": 0}
    arguments = {"root_path": str(data), "image_folder": "train"}
    one, other = (
        labelled_splits(ImageFolder(**arguments, max_value=value), **options).train for value in (None, 4095.0)
    )
    assert (one.digest, one.version != other.version) == (other.digest, True)


def train(folder: Path, data: Path) -> None:
    where = (
        f"dataset.root_path={data}",
        "dataset.image_folder=train",
        "dataset=imagefolder",
        "batch_size=4",
        "steps=4",
    )
    keys = (text for text in TINY if "num_samples" not in text)
    JEPAAgent(JEPAConfig(*keys, *where), folder=folder).train()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: shutil.rmtree(data / "train" / "dog"), "12 samples then, 6 now"),
        (
            lambda data: (data / "train" / "dog").rename(data / "train" / "ant"),
            r"cat, dog\) then, \(2: ant, cat",
        ),
        (lambda data: pictures(data, count=6, seed=1), "other contents or labels"),
    ],
)
def test_a_run_is_not_resumed_on_other_data(tmp_path: Path, change: Callable[[Path], Any], reason: str) -> None:
    data = pictures(tmp_path / "data", count=6)
    train(tmp_path / "run", data)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"status": "stopped"}))
    change(data)
    with pytest.raises(ConfigError, match=f"the data set has changed since the run was begun: .*{reason}"):
        train(tmp_path / "run", data)


@pytest.mark.slow
def test_jepa_eval_gives_no_figure_of_pictures_that_were_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "outputs" / "run", pictures(tmp_path / "data", count=10))
    command = [
        *("run=outputs/run", "dataset=imagefolder", f"dataset.root_path={tmp_path / 'data'}"),
        *("dataset.image_folder=train", "task=knn", "floors=[pixels]", "num_workers=0", "name=eval", "device=cpu"),
    ]
    assert eval_main(command) == 0
    rows = json.loads((tmp_path / "outputs" / "eval" / "eval.json").read_text())["rows"]
    pictures(tmp_path / "data", count=10, seed=1)
    capsys.readouterr()
    assert eval_main(command) == 1
    assert "holds results on other test samples" in capsys.readouterr().err
    assert eval_main([text.replace("name=eval", "name=again") for text in command]) == 0
    again = json.loads((tmp_path / "outputs" / "again" / "eval.json").read_text())["rows"]
    assert [row["key"] for row in rows] != [row["key"] for row in again]


@pytest.mark.slow
def test_jepa_eval_adds_no_row_where_one_test_picture_was_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = pictures(tmp_path / "data", count=10)
    shutil.copytree(pictures(tmp_path / "many", count=100) / "train", data / "val")
    train(tmp_path / "outputs" / "run", data)
    command = [
        *("run=outputs/run", "dataset=imagefolder", f"dataset.root_path={data}", "dataset.image_folder=train"),
        *("task=knn", "floors=[]", "num_workers=0", "name=eval", "device=cpu"),
    ]
    assert eval_main(command) == 0
    path = sorted((data / "val").rglob("*.bmp"))[not_among(64, 200)]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    capsys.readouterr()
    assert eval_main(command) == 1
    assert "holds results on other test samples" in capsys.readouterr().err
