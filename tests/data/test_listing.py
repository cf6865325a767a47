"""The listing of files in folders: classes, parts, links, and the account of what is left out."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jepa.data.images import ImageFolder
from jepa.data.listing import list_files, training_folder

SUFFIXES = (".png", ".jpg")


def add(folder: Path, *names: str) -> Path:
    """Files with a unique picture each."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name, format="png")
    return folder


def names(folder: Path, **kwargs: Any) -> list[tuple[str, int]]:
    files = list_files(folder, SUFFIXES, **kwargs).files
    return [(os.fsdecode(path), int(label)) for path, label in zip(files.paths, files.labels, strict=True)]


def test_classes_are_sub_folders_with_files_at_any_depth(tmp_path: Path) -> None:
    add(tmp_path, "dog/2.png", "dog/a/1.jpg", "cat/3.png")
    (tmp_path / "empty").mkdir()
    assert list_files(tmp_path, SUFFIXES).classes == ("cat", "dog")
    assert names(tmp_path) == [("cat/3.png", 0), ("dog/2.png", 1), ("dog/a/1.jpg", 1)]


@pytest.mark.parametrize("target", ["..", "../..", "../dog", ".", "../../root/dog", "../cat/deep"])
def test_a_link_to_a_folder_that_is_listed_anyway_adds_nothing(tmp_path: Path, target: str) -> None:
    root = add(tmp_path / "root", "cat/1.png", "cat/deep/2.png", "dog/3.png")
    expected = names(root)
    (root / "cat" / "again").symlink_to(target)
    listing = list_files(root, SUFFIXES)
    assert names(root) == expected
    assert listing.left_out == {"links to folders that are listed anyway": 1}


def test_links_out_of_the_folder_are_followed_once(tmp_path: Path) -> None:
    add(tmp_path / "store", "1.png", "2.png")
    root = add(tmp_path / "root", "dog/3.png")
    (root / "cat").symlink_to(tmp_path / "store")
    (root / "cow").symlink_to(tmp_path / "store")
    assert names(root) == [("cat/1.png", 0), ("cat/2.png", 0), ("dog/3.png", 1)]


def test_links_that_lead_round_in_a_circle_end(tmp_path: Path) -> None:
    root = add(tmp_path / "root", "cat/1.png")
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("a")
    assert names(root) == [("cat/1.png", 0)]
    assert list_files(root, SUFFIXES).left_out == {"broken links": 2}


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints/1.png", ".cache/a/1.png", "cat/.thumbs/1.png", "cat/._1.png"])
def test_hidden_folders_and_files_are_no_data(tmp_path: Path, hidden: str) -> None:
    add(tmp_path, "cat/1.png", "dog/1.png", hidden)
    assert names(tmp_path) == [("cat/1.png", 0), ("dog/1.png", 1)]


def test_files_beside_a_smaller_sub_folder_are_the_data(tmp_path: Path) -> None:
    add(tmp_path, "1.png", "2.png", "thumbnails/1.png", "thumbnails/2.png")
    assert names(tmp_path) == [("1.png", -1), ("2.png", -1)]
    assert list_files(tmp_path, SUFFIXES).left_out == {'in the sub-folder "thumbnails"': 2}


def test_files_beside_class_folders_are_left_out_and_counted(tmp_path: Path) -> None:
    add(tmp_path, "cover.png", "cat/1.png", "cat/2.png", "dog/1.png")
    listing = list_files(tmp_path, SUFFIXES)
    assert listing.classes == ("cat", "dog")
    assert str(listing) == f"{tmp_path}: 2 classes of folders, 3 files; left out: 1 in no class folder"


def test_files_of_other_types_are_counted_with_their_suffixes(tmp_path: Path) -> None:
    add(tmp_path, "cat/1.png")
    for name in ("a.heic", "b.HEIC", "c.avif", "README"):
        (tmp_path / "cat" / name).write_bytes(b"")
    assert list_files(tmp_path, SUFFIXES).left_out == {"files of other types (.heic, no suffix, .avif)": 4}


def test_a_folder_that_cannot_be_read_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(tmp_path, "cat/1.png", "dog/1.png")
    scandir = os.scandir

    def refuse(path: Path) -> os._ScandirIterator[str]:  # root may read everything
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("jepa.data.listing.os.scandir", refuse)
    assert names(tmp_path) == [("cat/1.png", 0)]
    assert list_files(tmp_path, SUFFIXES).left_out == {"folders that cannot be read": 1}


def test_a_class_folder_that_is_not_utf_8_has_a_name_that_can_be_printed(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    add(tmp_path, "tea/1.png")
    Image.new("RGB", (8, 8)).save(folder + b"/1.png")
    dataset = ImageFolder(root_path=str(tmp_path), image_folder=".")
    assert dataset.classes == ("caf\\xe9", "tea")
    assert "".join(dataset.classes).encode()
    assert dataset[0][0].shape == (3, 1, 8, 8)


@pytest.mark.parametrize("text", ["[ab]", "a*b", "x?", "{1..3}", "a b", "100%", "ü", "~"])
def test_pattern_characters_in_folder_names_are_plain(tmp_path: Path, text: str) -> None:
    add(tmp_path / text, f"train/{text}/1.png", "train/z/1.png", f"val/{text}/2.png", "val/z/1.png")
    dataset = ImageFolder(root_path=str(tmp_path / text), image_folder="train")
    assert len(dataset) == 2
    assert dataset.held_out is not None
    assert dataset.held_out.labels.tolist() == dataset.labels.tolist()


@pytest.mark.parametrize("parts", [("train", "val"), ("training", "test"), ("train", "valid", "test")])
def test_a_folder_of_parts_is_trained_on_its_training_part(tmp_path: Path, parts: tuple[str, ...]) -> None:
    for part in parts:
        add(tmp_path, f"{part}/cat/{part}.png", f"{part}/dog/{part}.png")
    dataset = ImageFolder(root_path=str(tmp_path), image_folder=".")
    assert dataset.classes == ("cat", "dog")
    assert dataset.describe(0).endswith(f"{parts[0]}/cat/{parts[0]}.png")
    assert dataset.held_out is not None
    assert dataset.held_out.describe(0).endswith(f"{parts[1]}/cat/{parts[1]}.png")


def test_a_class_named_train_among_others_is_a_class(tmp_path: Path) -> None:
    add(tmp_path, "train/1.png", "car/1.png", "plane/1.png")
    assert training_folder(tmp_path) == tmp_path
    assert ImageFolder(root_path=str(tmp_path), image_folder=".").classes == ("car", "plane", "train")


class TestHeldOut:
    def make(self, root: Path, *held_out: str, val_folder: str | None = None) -> ImageFolder:
        add(root, "train/cat/1.png", "train/dog/1.png", *(f"val/{name}" for name in held_out))
        return ImageFolder(root_path=str(root), image_folder="train", val_folder=val_folder)

    @pytest.mark.parametrize("val_folder", [None, "val"])
    def test_classes_are_matched_by_name_and_not_by_order(self, tmp_path: Path, val_folder: str | None) -> None:
        part = self.make(tmp_path, "dog/2.png", val_folder=val_folder).held_out
        assert part is not None
        assert part.labels.tolist() == [1]

    def test_other_capitals_are_the_same_class(self, tmp_path: Path) -> None:
        part = self.make(tmp_path, "Dog/2.png", "CAT/1.png").held_out
        assert part is not None
        assert [(part.describe(i).rpartition("/")[0][-3:], int(part.labels[i])) for i in (0, 1)] == [
            ("CAT", 0),
            ("Dog", 1),
        ]

    def test_a_class_more_is_left_out_and_named(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO):
            part = self.make(tmp_path, "cat/2.png", "dog/2.png", "zebra/1.png").held_out
        assert part is not None
        assert len(part) == 2
        assert '1 of the unknown class "zebra"' in caplog.text

    def test_a_class_more_in_a_named_part_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"dataset\.val_folder=val has classes that are not in .*train: \['zebra'\]"
        ):
            self.make(tmp_path, "cat/2.png", "zebra/1.png", val_folder="val")

    def test_a_part_without_class_folders_is_not_used_and_the_reason_is_said(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert self.make(tmp_path, "1.png", "2.png").held_out is None
        assert "val is not used as the held-out part: none of its 2 samples has a label of the 2 classes" in caplog.text

    def test_a_named_part_without_class_folders_is_used_without_labels(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        part = self.make(tmp_path, "1.png", val_folder="val").held_out
        assert part is not None
        assert part.labels.tolist() == [-1]
        assert "none of its 1 samples has a label of the 2 classes, so no probe is scored on it" in caplog.text

    def test_a_part_with_other_classes_only_is_not_used(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        assert self.make(tmp_path, "zebra/1.png", "cow/1.png").held_out is None
        assert "val is not used as the held-out part: it has other classes (cow, zebra)" in caplog.text


def test_one_line_says_what_is_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add(tmp_path, "train/cat/1.png", "train/dog/1.png", "train/loose.png")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("")
    with caplog.at_level(logging.INFO):
        ImageFolder(root_path=str(tmp_path), image_folder="train")
    lines = [record.getMessage() for record in caplog.records if "train:" in record.getMessage()]
    assert lines == [
        f"{tmp_path}/train: 2 classes of folders, 2 files; "
        "left out: 1 files of other types (.txt); 1 in no class folder"
    ]
