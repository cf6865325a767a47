"""Pictures of 1 to 16 channels and 16 bits: files of numpy, TIFF and PNG, and statistics that are measured."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from jepa.cli.train import main as train
from jepa.config import ConfigError, compose
from jepa.data.bands import measure
from jepa.data.decode import decode, find_channels
from jepa.data.frames import FrameFolders
from jepa.data.images import ImageFolder
from jepa.runs.metrics import read_json


def values(channels: int, dtype: type = np.uint16, seed: int = 0, white: float = 65535) -> np.ndarray:
    """[20, 24, C]"""
    shares = np.random.default_rng(seed).random((20, 24, channels))
    return (shares * white).astype(dtype)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tif(array: np.ndarray, **settings: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, photometric="minisblack", **settings)
    return file.getvalue()


def png(array: np.ndarray, mode: str) -> bytes:
    file = io.BytesIO()
    Image.frombytes(mode, (24, 20), np.ascontiguousarray(array).tobytes()).save(file, "png")
    return file.getvalue()


def first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(array, -1, 0).copy())


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7, 16])
def test_an_array_of_16_bits_gives_its_upper_eight_in_either_order(channels: int) -> None:
    array = values(channels)
    expected = first((array >> 8).astype(np.uint8))
    for data in (npy(array), npy(np.moveaxis(array, -1, 0))):
        assert torch.equal(decode(data, channels=channels)[:, 0], expected)
        assert find_channels(data) == channels


@pytest.mark.parametrize("channels", [2, 4, 5, 16])
def test_a_tiff_of_bands_gives_what_the_array_gives(channels: int) -> None:
    array = values(channels)
    expected = decode(npy(array), channels=channels)
    chunky = tif(array, planarconfig="contig")
    planar = tif(np.moveaxis(array, -1, 0), planarconfig="separate", compression="zlib")
    for data in (chunky, planar):
        assert torch.equal(decode(data, channels=channels), expected)
        assert find_channels(data) == channels


@pytest.mark.parametrize(("mode", "channels"), [("LA", 2), ("RGBA", 4)])
def test_a_png_with_alpha_keeps_it_as_a_channel_where_channels_say_so(mode: str, channels: int) -> None:
    array = values(channels, np.uint8, white=255)
    data = png(array, mode)
    assert torch.equal(decode(data, channels=channels)[:, 0], first(array))
    assert find_channels(data) == channels
    assert decode(data, channels=3).shape[0] == 3


def test_the_white_of_other_types_must_be_said() -> None:
    array = values(5, np.float32, white=2.0)
    with pytest.raises(OSError, match=r"float32: set dataset\.max_value"):
        decode(npy(array), channels=5)
    pixels = decode(npy(array), channels=5, max_value=2.0)[:, 0]
    assert torch.equal(pixels, first((array / 2 * 256).astype(np.uint8)))


@pytest.mark.parametrize("data", [npy(values(4)), tif(values(4)), png(values(4, np.uint8, white=255), "RGBA")])
def test_another_number_of_channels_is_refused(data: bytes) -> None:
    with pytest.raises(OSError, match=r"not \[H, W, 6\].*dataset\.channels is the number"):
        decode(data, channels=6)


@pytest.mark.parametrize("data", [npy(values(4))[:60], npy(np.array(["a"], dtype=object)), tif(values(5))[:80]])
def test_a_damaged_file_raises_oserror(data: bytes) -> None:
    with pytest.raises(OSError, match="not a readable array"):
        decode(data, channels=5)


@pytest.mark.parametrize(
    "data",
    [
        npy(values(4)).replace(b"(", b"[", 1),  # a head that is no Python any more
        npy(values(4)).replace(b"'shape': (", b"'shape': (9999999999999,", 1),  # more than any memory holds
        tif(values(5), compression="zlib").replace(b"\x78", b"\x00"),
    ],
)
def test_what_numpy_and_tifffile_raise_of_damaged_files_is_an_oserror_too(data: bytes) -> None:
    with pytest.raises(OSError):  # noqa: PT011
        decode(data, channels=5)


def write(folder: Path, channels: int, num: int = 6) -> None:
    for number in range(num):
        path = folder / "ab"[number % 2] / f"{number}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, values(channels, seed=number) // (2 - number % 2))


def test_statistics_are_those_of_all_pixels_and_the_same_every_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 5)
    with caplog.at_level(logging.INFO):
        dataset = ImageFolder(root_path=str(tmp_path), channels=None)
    assert "dataset.channels: 5, as in the first file" in caplog.text
    assert "measured on files: mean" in caplog.text
    pixels = torch.stack([clip for clip, _ in dataset]).transpose(0, 1).flatten(1).double() / 255
    torch.testing.assert_close(torch.tensor(dataset.mean).double(), pixels.mean(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(dataset.std).double(), pixels.std(1, correction=0), atol=1e-4, rtol=0)
    again = ImageFolder(root_path=str(tmp_path), channels=5)
    assert (again.mean, again.std) == (dataset.mean, dataset.std)


def test_a_constant_channel_can_be_normalised() -> None:
    _, std = measure(lambda index: torch.full((2, 1, 4, 4), 9, dtype=torch.uint8), 3)
    assert min(std) > 0


def test_photographs_keep_the_statistics_of_imagenet(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    assert ImageFolder(root_path=str(tmp_path)).mean == (0.485, 0.456, 0.406)


def test_frames_may_have_channels(tmp_path: Path) -> None:
    for number in range(4):
        path = tmp_path / "train" / f"v{number % 2}" / f"{number}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, values(6, seed=number))
    dataset = FrameFolders(root_path=str(tmp_path), num_frames=2, channels=6, val_ratio=0)
    assert dataset[0].clip.shape == (6, 2, 20, 24)
    assert len(dataset.mean) == 6


def test_grey_views_of_other_channels_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, 4)
    four = ["experiment=small_folder", f"dataset.root_path={tmp_path}", "dataset.channels=4"]
    with pytest.raises(ConfigError, match=r"augment\.grayscale=0\.1: pictures of 4 channels have no colour"):
        compose([*four, "augment.grayscale=0.1"])
    assert compose(four).augment.grayscale == 0


@pytest.mark.slow
def test_channels_train_and_evaluate_and_their_statistics_stay_with_the_run(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["jepa-train"])
    write(tmp_path / "data", 5, num=16)
    data = ["dataset=imagefolder", "dataset.root_path=data", "dataset.channels=null", "augment.jitter=0.5"]
    assert train([*data, *tiny, "logger=none", "name=bands"]) == 0
    errors = capfd.readouterr().err
    assert "augment.jitter changes brightness and contrast alone" in errors
    assert "5 channels" in errors
    (state,) = Path("outputs/bands/checkpoints").glob("step_00000002/state.json")
    facts = read_json(state)
    assert facts["clip_shape"][0] == 5
    assert facts["mean"] == list(ImageFolder(root_path="data", channels=5).mean)
    assert (Path("outputs/bands") / "report.html").is_file()
