"""Local parquet files and saved data sets of Hugging Face: splits, subsets, labels matched by name."""

from __future__ import annotations

import logging
import socket
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jepa.data.huggingface import HuggingFaceImages

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a local file needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(values: list[int], **columns: Any) -> Any:
    """A picture of one colour for each value."""
    images = []
    for value in values:
        buffer = BytesIO()
        Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, format="png")
        images.append({"bytes": buffer.getvalue(), "path": None})
    return datasets.Dataset.from_dict({"image": images, **columns})


def write(file: Path, values: list[int], **columns: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows(values, **columns).to_parquet(file)


def values(images: HuggingFaceImages) -> list[int]:
    return [int(images[index][0][0, 0, 0, 0]) for index in range(len(images))]


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("train/p/0.parquet", "test/p/0.parquet"),
        ("x/train/0.parquet", "x/validation/0.parquet"),
        ("Train/0.parquet", "VAL/0.parquet"),
        ("training-0.parquet", "dev-0.parquet"),
        ("data/train-00000-of-00001-ab.parquet", "data/test-00000-of-00001-cd.parquet"),
        ("part-0.parquet", "test/part-0.parquet"),
    ],
)
def test_the_nearest_folder_or_file_that_names_a_split_decides(tmp_path: Path, train: str, held_out: str) -> None:
    write(tmp_path / "set" / train, [1, 2, 3], label=[0, 1, 0])
    write(tmp_path / "set" / held_out, [4, 5], label=[1, 0])
    images = HuggingFaceImages(path=str(tmp_path / "set"))
    part = images.validation()
    assert part is not None
    assert (values(images), values(part)) == ([1, 2, 3], [4, 5])


def test_files_that_name_no_split_beside_those_that_do_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "set" / "train-0.parquet", [1, 2], label=[0, 1])
    write(tmp_path / "set" / "extra.parquet", [3], label=[0])
    with caplog.at_level(logging.INFO):
        images = HuggingFaceImages(path=str(tmp_path / "set"))
    assert values(images) == [1, 2]
    assert "1 files that name no split are left out" in caplog.text
    assert "1 files of the split train" in caplog.text


def test_a_subset_is_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "set" / "red" / "train-0.parquet", [1, 2], label=[0, 1])
    write(tmp_path / "set" / "blue" / "train-0.parquet", [3, 4], label=[0, 1])
    assert values(HuggingFaceImages(path=str(tmp_path / "set"), subset="blue")) == [3, 4]
    with pytest.raises(ValueError, match=r"dataset\.subset=green: no folder of this name .* holds blue/, red/"):
        HuggingFaceImages(path=str(tmp_path / "set"), subset="green")


def test_splits_with_their_classes_in_another_order_are_matched_by_name(tmp_path: Path) -> None:
    for split, names, labels in (("train", ["ant", "bee"], [0, 1]), ("test", ["bee", "ant"], [0, 1])):
        table = rows([1, 2], label=labels).cast_column("label", datasets.ClassLabel(names=names))
        table.to_parquet(tmp_path / f"{split}.parquet")
    images = HuggingFaceImages(path=str(tmp_path))
    part = images.validation()
    assert part is not None
    assert (images.classes, part.labels.tolist()) == (("ant", "bee"), [1, 0])


def test_text_labels_in_other_capitals_and_of_other_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "train.parquet", [1, 2], label=["ant", "bee"])
    write(tmp_path / "val.parquet", [3, 4, 5], label=["Bee", "cow", "ant"])
    part = HuggingFaceImages(path=str(tmp_path)).validation()
    assert part is not None
    assert part.labels.tolist() == [1, -1, 0]
    assert "labels that are not among the 2 classes: ['cow']; 1 samples have no label" in caplog.text
    with pytest.raises(ValueError, match="not among the 2 classes"):
        HuggingFaceImages(path=str(tmp_path), val="val")


def test_a_split_whose_labels_are_hidden_is_passed_over_for_one_with_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "train.parquet", [1, 2], label=[0, 1])
    write(tmp_path / "validation.parquet", [3, 4], label=[-1, -1])
    write(tmp_path / "test.parquet", [5, 6], label=[1, 0])
    part = HuggingFaceImages(path=str(tmp_path)).validation()
    assert part is not None
    assert values(part) == [5, 6]
    assert "split validation is not used as the held-out part: none of its 2 samples has a label" in caplog.text
    named = HuggingFaceImages(path=str(tmp_path), val="validation").validation()
    assert named is not None
    assert named.labels.tolist() == [-1, -1]
    assert "so no probe is scored on it" in caplog.text


@pytest.mark.parametrize("labels", [[10**9, 5, 6], [-7, 0, 1], [0.5, 0.1, 0.2]])
def test_a_column_that_cannot_hold_classes_is_not_used_unasked(
    tmp_path: Path, labels: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "train.parquet", [1, 2, 3], label=labels, target=[0, 1, 0])
    images = HuggingFaceImages(path=str(tmp_path))
    assert (images.label_column, images.labels.tolist()) == ("target", [0, 1, 0])
    assert "the column label is not used for labels" in caplog.text
    with pytest.raises(ValueError, match=r"dataset\.label_column=label: "):
        HuggingFaceImages(path=str(tmp_path), label_column="label")


def test_a_folder_of_save_to_disk_is_read(tmp_path: Path) -> None:
    table = rows([1, 2, 3, 4], label=[0, 1, 0, 1])
    table.select([2, 0]).save_to_disk(str(tmp_path / "one"))
    assert values(HuggingFaceImages(path=str(tmp_path / "one"))) == [3, 1]
    datasets.DatasetDict(train=table.select([3, 1]), test=table.select([0])).save_to_disk(str(tmp_path / "two"))
    images = HuggingFaceImages(path=str(tmp_path / "two"))
    part = images.validation()
    assert part is not None
    assert (values(images), values(part)) == ([4, 2], [1])


def test_empty_and_differing_and_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "empty" / "train.parquet", [], label=[])
    with pytest.raises(ValueError, match=r"split train of .*empty cannot be read: .* no data"):
        HuggingFaceImages(path=str(tmp_path / "empty"))
    write(tmp_path / "mixed" / "train-0.parquet", [1], label=[0])
    write(tmp_path / "mixed" / "train-1.parquet", [1], kind=["a"])
    with pytest.raises(ValueError, match=r"train-1.parquet has the columns image, kind, .*0.parquet has image, label"):
        HuggingFaceImages(path=str(tmp_path / "mixed"))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "train.parquet").write_bytes((tmp_path / "mixed" / "train-0.parquet").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"split train of .*cut cannot be read: .*cut/train.parquet: "):
        HuggingFaceImages(path=str(tmp_path / "cut"))
