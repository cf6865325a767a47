"""Labelled images from folders and from torchvision's data sets."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from jepa.data.decode import SUFFIXES
from jepa.data.folders import FileDataset, locked
from jepa.data.listing import held_out_listing, list_training
from jepa.types import Bands, ClassLevel, Positive


class ImageFolder(FileDataset):
    """Images of `root_path`/`image_folder`: one sub-folder for each class, or all in one folder without labels.

    `image_folder` None takes the training part of `root_path`, or `root_path` itself. `val_folder` is the held-out
    part, beside it; None takes a folder with a default name and the same classes. `class_level` is that of
    `list_files`; `channels` None are those of the first file.
    """

    rules = ("jepa.data.rules.folders",)
    survey = "jepa.data.survey.look"

    def __init__(
        self, *, root_path: str, image_folder: str | None = None, val_folder: str | None = None,
        class_level: ClassLevel | None = None, channels: Bands | None = 3, max_value: Positive | None = None,
    ) -> None:  # fmt: skip
        super().__init__(channels, max_value=max_value)
        root = Path(root_path).expanduser().absolute()
        listing = list_training(root, image_folder, SUFFIXES, "dataset.image_folder", class_level)
        self.classes = listing.classes
        self._load(*listing.files)
        self.find_channels()
        held_out = held_out_listing(listing, root, val_folder, SUFFIXES, class_level)
        self.held_out = None if held_out is None else self._part(*held_out.files)
        self.warn_of_dark_images()

    def _load(self, folder: Path, paths: np.ndarray, labels: np.ndarray) -> None:
        self.folder, self.paths, self.labels = folder, paths, labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """uint8 [C, 1, H, W] and its label; raises OSError or RuntimeError if it cannot be read."""
        return self.decode(self.read(index)), int(self.labels[index])

    def describe(self, index: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self.paths[index]))


TORCHVISION = {
    "cifar10": (datasets.CIFAR10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": (datasets.CIFAR100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": (datasets.MNIST, (0.1307,), (0.3081,)),
    "fashion_mnist": (datasets.FashionMNIST, (0.2860,), (0.3530,)),
    "stl10": (datasets.STL10, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
}
"""Class of torchvision, and mean and standard deviation of the pixels in [0, 1], by data set."""


class TorchvisionImages:
    """A data set of torchvision that fits in memory; its test part is held out.

    The training part of stl10 includes the unlabelled images, with the label -1.
    """

    rules = ("jepa.data.rules.download",)
    in_memory = True

    def __init__(
        self, *, name: Annotated[str, Literal["cifar10", "cifar100", "mnist", "fashion_mnist", "stl10"]],
        root_path: str, download: bool = True,
    ) -> None:  # fmt: skip
        self.name = name
        self.root = Path(root_path).expanduser().absolute()
        self.download = download
        _, self.mean, self.std = TORCHVISION[name]
        self.channels = len(self.mean)
        self._load(train=True)

    def _load(self, train: bool) -> None:
        self.part = "train" if train else "test"
        try:
            source = self._source(train)
        except (OSError, RuntimeError) as error:
            settings = f"dataset.name={self.name} dataset.download={str(self.download).lower()}"
            reason = "; ".join(line.strip() for line in f"{error}".splitlines() if line.strip())
            advice = "where there is no network, put the files of torchvision there"
            raise ValueError(f"{settings}: not in {self.root}, or incomplete: {reason}; {advice}") from error
        self.classes = tuple(source.classes)
        self.pixels = _channels_last(torch.as_tensor(source.data), self.channels)
        self.labels = np.asarray(source.labels if self.name == "stl10" else source.targets, dtype=np.int64)

    def _source(self, train: bool) -> Any:
        """torchvision's data set; existing files are read without writing, and one process at a time downloads."""
        cls: Any = TORCHVISION[self.name][0]
        split = "train+unlabeled" if train else "test"
        part = {"split": split} if self.name == "stl10" else {"train": train}
        try:
            return cls(self.root, **part, download=False)
        except RuntimeError:
            if not self.download:
                raise
        with locked(self.root / ".lock"):
            return cls(self.root, **part, download=True)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """uint8 [C, 1, H, W] and its label or -1"""
        return self.pixels[index].permute(2, 0, 1).unsqueeze(1), int(self.labels[index])

    def describe(self, index: int) -> str:
        return f"{self.name} {self.part} {index}"

    def validation(self) -> TorchvisionImages | None:
        if self.part == "test":
            return None
        held_out = copy.copy(self)
        held_out._load(train=False)
        return held_out


def _channels_last(pixels: Tensor, channels: int) -> Tensor:
    """[n, H, W], [n, H, W, C] or [n, C, H, W] -> [n, H, W, C]"""
    if pixels.ndim == 3:
        return pixels.unsqueeze(-1)
    return pixels if pixels.shape[-1] == channels else pixels.permute(0, 2, 3, 1)
