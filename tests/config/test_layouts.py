"""Folders of files are taken as they are usually laid out, or refused with the keys to choose by."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from PIL import Image

from jepa.agent import JEPAAgent
from jepa.cli.train import main
from jepa.config import ConfigError, TrainConfig, compose, compose_eval
from jepa.config.attributes import JEPAConfig
from jepa.config.finetuning import to_train_arguments
from jepa.config.layouts import VIDEO_SUFFIXES
from jepa.config.machine import check_costly_default, check_start
from jepa.data.images import ImageFolder
from jepa.data.listing import list_training

OWN = ["experiment=small_folder", "dataset.root_path=data"]
LAYOUTS = {
    "classes": (["cat/1.png", "dog/1.png"], ".", 2, 2, None),
    "parts": (["train/cat/1.png", "train/dog/1.png", "val/cat/1.png"], "train", 2, 2, "val/cat/1.png"),
    "other names": (
        ["Training/cat/1.png", "Training/dog/1.png", "Testing/dog/2.png"], "Training", 2, 2, "Testing/dog/2.png"
    ),
    "marked parts": (
        ["seg_train/a/1.png", "seg_train/b/1.png", "seg_test/b/3.png"], "seg_train", 2, 2, "seg_test/b/3.png"
    ),
    "parts without classes": (["train/1.png", "train/2.png", "test/3.png"], "train", 0, 2, "test/3.png"),
    "flat": (["1.png", "2.png", "notes.txt"], ".", 0, 2, None),
    "inside another": (["photos/cat/1.png", "photos/dog/1.png", "labels/x.csv"], "photos", 2, 2, None),
    "wrapped parts": (
        ["train/images/1.png", "train/images/2.png", "val/images/3.png"], "train/images", 0, 2, "val/images/3.png"
    ),
    "deep classes": (["train/cat/images/1.png", "train/dog/images/1.png"], "train", 2, 2, None),
    "a class named train": (["train/a/1.png", "train/b/2.png", "extra/3.png"], "train", 2, 2, None),
}  # fmt: skip
AMBIGUOUS = {
    "two parts": (["train/1.png", "training/2.png"], ["image_folder=train,", "image_folder=training"]),
    "only held out": (["val/1.png", "test/1.png"], ["image_folder=test,", "image_folder=val"]),
    "class or part": (["bus/1.png", "car/1.png", "train/1.png"], ["image_folder=.", "image_folder=train"]),
    "class or held out": (["cat/1.png", "dog/1.png", "test/1.png"], ["image_folder=."]),
    "two levels": (
        ["2020/a/1.png", "2020/b/1.png", "2021/a/1.png", "2021/b/1.png"], [f"class_level={n}" for n in (0, 1, 2)]
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lay_out(paths: list[str]) -> None:
    for path in map(Path("data").joinpath, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path) if path.suffix == ".png" else path.touch()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_root_path_alone_takes_a_usual_layout(layout: str, caplog: pytest.LogCaptureFixture) -> None:
    paths, folder, num_classes, num_files, held_out = LAYOUTS[layout]
    lay_out(paths)
    assert compose(OWN).dataset["image_folder"] == folder
    with caplog.at_level(logging.INFO):
        dataset = ImageFolder(root_path="data")
    assert (len(dataset.classes), len(dataset)) == (num_classes, num_files)
    part = dataset.held_out
    assert held_out is None if part is None else part.describe(0) == os.path.abspath(f"data/{held_out}")
    kind = f"{num_classes} classes of folders" if num_classes else "no classes"
    (line,) = [record.getMessage() for record in caplog.records if kind in record.getMessage()]
    assert f"{kind}, {num_files} files" in line
    assert ("for evaluation" in line) == (held_out is not None)


@pytest.mark.parametrize("layout", AMBIGUOUS)
def test_an_ambiguous_folder_is_refused_with_the_choices(layout: str) -> None:
    paths, choices = AMBIGUOUS[layout]
    lay_out(paths)
    with pytest.raises(ConfigError) as refused:
        compose(OWN)
    assert [choice for choice in choices if f"dataset.{choice}" not in str(refused.value)] == []
    for choice in choices:
        compose([*OWN, f"dataset.{choice.rstrip(',')}"])


def test_levels_choose_the_classes() -> None:
    lay_out(AMBIGUOUS["two levels"][0])
    for level, classes in ((0, ()), (1, ("2020", "2021")), (2, ("a", "b"))):
        dataset = ImageFolder(root_path="data", class_level=level)
        assert (dataset.classes, len(dataset)) == (classes, 4)


def test_more_files_beside_class_folders_than_in_them_are_refused() -> None:
    lay_out(["1.png", "2.png", "3.png", "a/1.png", "b/1.png"])
    with pytest.raises(ValueError, match=r"class_level=0 takes all.*class_level=1"):
        ImageFolder(root_path="data")
    assert len(ImageFolder(root_path="data", class_level=0)) == 5
    assert ImageFolder(root_path="data", class_level=1).classes == ("a", "b")


def test_a_folder_beside_the_data_is_never_held_out() -> None:
    lay_out(["1.png", "../test/2.png"])
    assert ImageFolder(root_path="data").held_out is None


def test_the_same_keys_serve_python_and_the_other_commands() -> None:
    lay_out(LAYOUTS["other names"][0])
    config = JEPAConfig()
    config.dataset, config.root_path, config.size = "imagefolder", "data", "base"
    others = [compose_eval(["run=pixels", "image_size=32", "dataset=imagefolder", "dataset.root_path=data"])]
    others += [compose(["dataset=imagefolder", "dataset.root_path=data"])]
    assert {one.dataset["image_folder"] for one in (config.compose(), *others)} == {"Training"}
    given = to_train_arguments(["run=timm:x", "dataset=imagefolder", "dataset.root_path=data"])
    assert not [text for text in given if "image_folder" in text]  # the check of jepa-train chooses it


def test_videos_are_laid_out_alike() -> None:
    lay_out(["Train/a/1.mp4", "Train/b/1.mp4", "Val/a/2.mp4", "poster.png"])
    listing = list_training(Path("data"), None, VIDEO_SUFFIXES, "dataset.video_folder")
    assert (listing.files.folder.name, listing.classes, len(listing.files.paths)) == ("Train", ("a", "b"), 2)
    config = compose(["dataset=videofolder", "dataset.root_path=data", "encoder=temporal"])
    assert config.dataset["video_folder"] == "Train"


def test_an_empty_folder_is_refused_before_the_start() -> None:
    lay_out(["train/notes.txt"])
    with pytest.raises(ConfigError, match="no images"):
        compose(OWN)
    with pytest.raises(ConfigError, match=r"image_size=auto .*: no images"):
        compose([*OWN, "dataset.image_folder=train"])
    config = compose(["experiment=sign_digits", *OWN[1:], "dataset.image_folder=train"])
    with pytest.raises(ConfigError, match=r"dataset\.image_folder=train: no images"):
        check_start(config)


class TestCostlyDefault:
    DATA = ("dataset=imagefolder", "dataset.root_path=data")

    @pytest.fixture(autouse=True)
    def _data_without_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lay_out(["cat/1.png", "dog/1.png"])
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def check(self, *typed: str) -> TrainConfig:
        config = compose(typed)
        check_costly_default(config, typed, Path("outputs/x"))
        return config

    def test_own_data_without_a_size_are_refused_with_a_smaller_command_that_is_valid(self) -> None:
        with pytest.raises(ConfigError, match=r"86M|85M") as refused:
            self.check(*self.DATA, "epochs=100", "name=cats")
        command = str(refused.value).partition("A smaller one: jepa-train ")[2].partition(" (")[0]
        assert command.split() == ["experiment=small_folder", "dataset.root_path=data", "name=cats"]
        assert self.check(*command.split()).encoder["embed_dim"] == 256

    def test_python_and_the_command_refuse_alike(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ConfigError, match="no size is chosen"):
            JEPAAgent(JEPAConfig(*self.DATA)).train()
        monkeypatch.setattr("sys.argv", ["jepa-train"])
        with pytest.raises(SystemExit, match="2"):
            main([*self.DATA, "logger=none"])
        assert not Path("outputs/jepa-imagefolder/run.json").exists()

    def test_clips_get_a_smaller_command_that_is_valid(self) -> None:
        lay_out(["1.mp4"])
        with pytest.raises(ConfigError) as refused:
            self.check("dataset=videofolder", "dataset.root_path=data", "encoder=temporal", "mask=temporal")
        command = str(refused.value).partition("A smaller one: jepa-train ")[2].partition(" (")[0]
        self.check(*command.split())

    @pytest.mark.parametrize(
        "typed", ["size=base", "size=tiny", "encoder.embed_dim=96 encoder.num_heads=3", "experiment=small_folder"]
    )
    def test_a_typed_size_is_trained(self, typed: str) -> None:
        self.check(*self.DATA, *typed.split())

    def test_drawn_data_and_begun_runs_are_trained(self) -> None:
        self.check()
        Path("outputs/x/checkpoints").mkdir(parents=True)
        self.check(*self.DATA)

    def test_a_gpu_trains_the_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        monkeypatch.setattr("jepa.config.machine.GPU_FILES", (os.getcwd(),))
        self.check(*self.DATA)


def test_a_missing_gpu_is_refused_by_files_of_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jepa.config.machine.GPU_FILES", ("nowhere",))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ConfigError, match="device=cuda: there is no CUDA device"):
        check_start(compose(["device=cuda"]))
    check_start(compose(["device=cpu"]))
