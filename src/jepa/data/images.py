"""Labelled images from folders and from torchvision's data sets."""

from __future__ import annotations

import copy
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from jepa.config.paths import content, existing
from jepa.data.decode import SUFFIXES, decode, warn_of_slow_decoding
from jepa.data.folders import HoldingOut
from jepa.data.listing import held_out_listing, list_files, training_folder
from jepa.types import Channels

log = logging.getLogger(__name__)
NATURAL = {3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1: ((0.449,), (0.226,))}
"""mean and standard deviation of ImageNet's pixels in [0, 1], by the number of channels"""


class ImageFolder(HoldingOut):
    """Images of `root_path`/`image_folder`: one sub-folder for each class, or all in it and without labels.

    `val_folder` is the held-out part, beside `image_folder`; None takes a folder of a usual name with the same classes.
    """

    rules = ("jepa.data.rules.folders",)

    def __init__(
        self, *, root_path: str, image_folder: str, val_folder: str | None = None, channels: Channels = 3
    ) -> None:
        warn_of_slow_decoding()
        root = Path(root_path).expanduser().absolute()
        folder = training_folder(existing(root / image_folder, "dataset.image_folder", "folder"), SUFFIXES)
        self.channels = channels
        self.mean, self.std = NATURAL[channels]
        listing = list_files(folder, SUFFIXES)
        if not len(listing.files.paths):
            raise ValueError(f"no images ({' '.join(SUFFIXES)}) in {folder} or its sub-folders; {content(folder)}")
        log.info("%s", listing)
        self.classes = listing.classes
        self._take(*listing.files)
        held_out = held_out_listing(folder, root, val_folder, self.classes, SUFFIXES)
        self.held_out = None if held_out is None else self._apart(*held_out.files)

    def _take(self, folder: Path, paths: np.ndarray, labels: np.ndarray) -> None:
        self.folder, self.paths, self.labels = folder, paths, labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """uint8 [C, 1, H, W] and its label; raises OSError or RuntimeError when it can't be read."""
        with open(self.describe(index), "rb") as file:
            data = file.read()
        return decode(data, channels=self.channels), int(self.labels[index])

    def describe(self, index: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self.paths[index]))


TORCHVISION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
}
"""mean and standard deviation of the pixels in [0, 1], by data set"""


class TorchvisionImages:
    """A data set of torchvision that fits in memory, with its own test part held out.

    Of stl10 the unlabelled images are used too, with the label -1.
    """

    rules = ("jepa.data.rules.download",)
    in_memory = True

    def __init__(
        self,
        *,
        name: Annotated[str, Literal["cifar10", "cifar100", "mnist", "fashion_mnist", "stl10"]],
        root_path: str,
        download: bool = True,
    ) -> None:
        self.name = name
        self.root = Path(root_path).expanduser().absolute()
        self.download = download
        self.mean, self.std = TORCHVISION[name]
        self.channels = len(self.mean)
        self._load(train=True)

    def _load(self, train: bool) -> None:
        self.part = "train" if train else "test"
        try:
            source = self._source(train)
        except (OSError, RuntimeError) as error:
            settings = f"dataset.name={self.name} dataset.download={str(self.download).lower()}"
            raise ValueError(f"{settings}: not in {self.root}, or incomplete: {error}") from error
        self.classes = tuple(source.classes)
        self.pixels = _channels_last(torch.as_tensor(source.data), self.channels)
        self.labels = np.asarray(source.labels if self.name == "stl10" else source.targets, dtype=np.int64)

    def _source(self, train: bool) -> Any:
        """torchvision's object; what is there already is read without writing, and one process at a time downloads."""
        try:
            return _torchvision_source(self.name, self.root, train, download=False)
        except RuntimeError:
            if not self.download:
                raise
        with _alone(self.root):
            return _torchvision_source(self.name, self.root, train, download=True)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """uint8 [C, 1, H, W] and its label, -1 without"""
        return self.pixels[index].permute(2, 0, 1).unsqueeze(1), int(self.labels[index])

    def describe(self, index: int) -> str:
        return f"{self.name} {self.part} {index}"

    def validation(self) -> TorchvisionImages | None:
        if self.part == "test":
            return None
        held_out = copy.copy(self)
        held_out._load(train=False)
        return held_out


def _torchvision_source(name: str, root: Path, train: bool, download: bool) -> Any:
    if name == "stl10":
        return datasets.STL10(root, split="train+unlabeled" if train else "test", download=download)
    kinds = {
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
        "mnist": datasets.MNIST,
        "fashion_mnist": datasets.FashionMNIST,
    }
    return kinds[name](root, train=train, download=download)


def _channels_last(pixels: Tensor, channels: int) -> Tensor:
    """[n, H, W], [n, H, W, C] or [n, C, H, W] -> [n, H, W, C]"""
    if pixels.ndim == 3:
        return pixels.unsqueeze(-1)
    return pixels if pixels.shape[-1] == channels else pixels.permute(0, 2, 3, 1)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time is inside, so that two ranks do not download into one file."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
