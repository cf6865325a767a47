"""Decoding of image formats, and the data sets of images."""

import io
import logging
import pickle
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from checked import checked
from PIL import Image

from jepa.data.decode import decode
from jepa.data.huggingface import HuggingFaceImages
from jepa.data.images import ImageFolder, TorchvisionImages

SHARED = Path(__file__).parents[3] / "shared" / "data"
CIFAR = pytest.mark.skipif(not (SHARED / "cifar10").is_dir(), reason="the CIFAR-10 parquet files are missing")


def gradient(height: int = 24, width: int = 32) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    red, green, blue = rows * 255 // max(height - 1, 1), columns * 255 // max(width - 1, 1), (rows + columns) * 3 % 256
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def expected(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).unsqueeze(1)


def write(path: Path, image: Image.Image | None = None, data: bytes | None = None, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(image or gradient(), "JPEG", **options) if data is None else data)


def folder_of_two_classes(root: Path, parts: tuple[str, ...] = ("train",), images: int = 3) -> Path:
    for part in parts:
        for label in ("cat", "dog"):
            for number in range(images):
                write(root / part / label / f"{number}.jpg", gradient(20 + number, 30))
    return root


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1"])
def test_lossless_formats_decode_to_the_saved_pixels(kind, mode):
    image = gradient().convert("RGB" if (kind, mode) == ("PPM", "P") else mode)  # PPM has no palettes
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(image, kind, **options)
    assert torch.equal(decode(data), expected(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_decodes_as_pillow_does(mode):
    data = encode(gradient().convert(mode), "JPEG", quality=95)
    difference = decode(data).int() - expected(Image.open(io.BytesIO(data))).int()
    assert difference.abs().max() <= 2


def test_without_decoders_of_torchvision_pillow_reads_all_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("jepa.data.decode._FAST", {})
    images = ImageFolder(root_path=str(folder_of_two_classes(tmp_path)), image_folder="train")
    assert "images are decoded by Pillow, which takes longer" in caplog.text
    path = tmp_path / "train" / "cat" / "0.jpg"
    assert torch.equal(images[0][0], expected(Image.open(path)))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_upper_eight(kind):
    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    decoded = decode(encode(Image.fromarray(values), kind))
    assert torch.equal(decoded[:, 0], torch.from_numpy((values >> 8).astype(np.uint8)).expand(3, 64, 64))


def test_one_channel_gives_grey():
    grey = decode(encode(gradient(), "PNG"), channels=1)
    reference = torch.from_numpy(np.array(gradient().convert("L")))
    assert grey.shape == (1, 1, 24, 32)
    assert (grey[0, 0].int() - reference.int()).abs().max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "WEBP", "PNG"])
def test_images_are_rotated_by_their_orientation_tag(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    upright = decode(encode(gradient(16, 40), kind, exif=exif))
    assert upright.shape[-2:] == (40, 16)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_the_smallest_images_decode(size):
    assert decode(encode(gradient(*size), "JPEG")).shape == (3, 1, *size)


def damaged() -> dict[str, bytes]:
    big = gradient(100, 100)
    whole = {kind: encode(big, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")}
    halves = {f"half a {kind}": data[: len(data) // 2] for kind, data in whole.items()}
    heads = {f"head of a {kind}": data[:24] for kind, data in whole.items()}
    wide = encode(Image.fromarray(np.ones((4, 4), np.int32), "I"), "TIFF")
    return halves | heads | {"nothing": b"", "text": b"This is not an image.", "32 bits": wide}


@pytest.mark.parametrize("name", damaged())
def test_a_damaged_file_raises_oserror_or_runtimeerror(name):
    with pytest.raises((OSError, RuntimeError)):
        decode(damaged()[name])


def test_folders_are_classes_in_sorted_order_and_other_files_are_left_out(tmp_path):
    root = folder_of_two_classes(tmp_path)
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    write(root / "train" / "cat" / "._0.jpg", data=b"resource fork")
    write(root / "train" / "cat" / "deep" / "er" / "UPPER.JPG")
    (root / "train" / "empty").mkdir()
    write(root / "train" / ".cache" / "0.jpg")
    images = ImageFolder(root_path=str(root), image_folder="train")
    assert images.classes == ("cat", "dog")
    assert len(images) == 7
    assert sorted(label for _, label in (images[i] for i in range(7))) == [0, 0, 0, 0, 1, 1, 1]
    assert any(images.describe(i).endswith("train/cat/deep/er/UPPER.JPG") for i in range(7))


def test_a_sample_is_a_uint8_clip_of_one_frame_described_by_its_path(tmp_path):
    images = ImageFolder(root_path=str(folder_of_two_classes(tmp_path)), image_folder="train")
    clip, label = images[1]
    assert (clip.dtype, clip.shape, label) == (torch.uint8, (3, 1, 21, 30), 0)
    assert images.describe(1) == str(tmp_path / "train" / "cat" / "1.jpg")


def test_a_flat_folder_is_unlabelled(tmp_path):
    for number in range(3):
        write(tmp_path / "pictures" / f"{number}.png", gradient())
    images = ImageFolder(root_path=str(tmp_path), image_folder="pictures")
    assert (images.classes, len(images), images[2][1]) == ((), 3, -1)


def test_the_held_out_part_beside_the_images_is_used_and_logged(tmp_path, caplog):
    root = folder_of_two_classes(tmp_path, ("train", "test"))
    with caplog.at_level(logging.INFO):
        held_out = ImageFolder(root_path=str(root), image_folder="train").validation()
    assert held_out is not None
    assert held_out.describe(0) == str(root / "test" / "cat" / "0.jpg")
    assert held_out.validation() is None
    assert str(root / "test") in caplog.text


def test_a_held_out_part_keeps_the_label_numbers_of_the_training_part(tmp_path):
    root = folder_of_two_classes(tmp_path)
    write(root / "other" / "dog" / "0.jpg")
    held_out = ImageFolder(root_path=str(root), image_folder="train", val_folder="other").validation()
    assert held_out is not None
    assert held_out[0][1] == 1


def test_a_test_folder_without_the_same_classes_is_not_used(tmp_path):
    root = folder_of_two_classes(tmp_path)
    write(root / "test" / "0.jpg")
    assert ImageFolder(root_path=str(root), image_folder="train").validation() is None
    write(root / "test" / "bird" / "0.jpg")
    assert ImageFolder(root_path=str(root), image_folder="train").validation() is None


def test_unknown_classes_in_a_configured_held_out_part_are_refused(tmp_path):
    root = folder_of_two_classes(tmp_path)
    write(root / "other" / "bird" / "0.jpg")
    with pytest.raises(ValueError, match="bird"):
        ImageFolder(root_path=str(root), image_folder="train", val_folder="other")


def test_the_error_for_a_missing_folder_has_its_path_and_the_existing_folders(tmp_path):
    root = folder_of_two_classes(tmp_path)
    with pytest.raises(ValueError, match=r"image_folder") as error:
        ImageFolder(root_path=str(root), image_folder="trian")
    assert str(root / "trian") in str(error.value)
    assert "train/" in str(error.value)
    with pytest.raises(ValueError, match=str(tmp_path)):
        ImageFolder(root_path=str(tmp_path / "a" / "b"), image_folder="train")


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "list.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"no images.*list\.csv"):
        ImageFolder(root_path=str(tmp_path), image_folder="train")


def test_an_image_folder_pickles_to_about_the_length_of_its_paths(tmp_path):
    images = ImageFolder(root_path=str(folder_of_two_classes(tmp_path)), image_folder="train")
    images.paths = np.tile(images.paths, 1000)
    assert len(pickle.dumps(images)) < 2 * images.paths.nbytes
    assert pickle.loads(pickle.dumps(images)).describe(4) == images.describe(4)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a local file needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def hf(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def rows(count: int, **columns) -> dict:
    images = [{"bytes": encode(gradient(8 + i, 9), "PNG"), "path": f"{i}.png"} for i in range(count)]
    return {"image": images, **columns}


def test_parquet_files_in_a_folder_are_splits_named_by_their_names(tmp_path, hf, no_network):
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for number in range(2):
        table = hf.Dataset.from_dict(rows(3, label=[0, 2, 0], label_name=["ant", "cow", "ant"]))
        table.to_parquet(folder / f"train-0000{number}-of-00002.parquet")
    hf.Dataset.from_dict(rows(2, label=[2, 0], label_name=["cow", "ant"])).to_parquet(folder / "test.parquet")
    images = HuggingFaceImages(path=str(tmp_path / "set"))
    held_out = images.validation()
    assert held_out is not None
    assert (len(images), len(held_out)) == (6, 2)
    assert images.classes == ("ant", "1", "cow")
    assert torch.equal(images[4][0], decode(encode(gradient(9, 9), "PNG")))
    assert (images[4][1], held_out[0][1]) == (2, 2)
    assert "1.png" in images.describe(4)
    assert pickle.loads(pickle.dumps(images)).describe(4) == images.describe(4)


def test_one_parquet_file_with_typed_columns_of_other_names(tmp_path, hf, no_network):
    table = hf.Dataset.from_dict({"photo": rows(4)["image"], "kind": [1, 0, 1, -1]})
    table = table.cast_column("photo", hf.Image()).cast_column("kind", hf.ClassLabel(names=["off", "on"]))
    table.to_parquet(tmp_path / "things.parquet")
    images = HuggingFaceImages(path=str(tmp_path / "things.parquet"))
    assert images.classes == ("off", "on")
    assert [images[i][1] for i in range(4)] == [1, 0, 1, -1]
    assert images.validation() is None


def test_labels_may_be_strings_and_may_be_missing(tmp_path, hf, no_network):
    hf.Dataset.from_dict(rows(4, label=["b", "", None, "10"])).to_parquet(tmp_path / "strings.parquet")
    images = HuggingFaceImages(path=str(tmp_path / "strings.parquet"))
    assert (images.classes, images.labels.tolist()) == (("10", "b"), [1, -1, -1, 0])
    hf.Dataset.from_dict(rows(3)).to_parquet(tmp_path / "without.parquet")
    images = HuggingFaceImages(path=str(tmp_path / "without.parquet"))
    assert (images.classes, images.labels.tolist()) == ((), [-1, -1, -1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_column": "lable"}, r"dataset\.label_column=lable.*label \(Value\)"),
        ({"image_column": "img"}, r"dataset\.image_column=img.*image"),
        ({"label_column": "boxes"}, r"boxes: expected integers or strings"),
        ({"train": "full", "val": "hold"}, r"dataset\.val=hold"),
        ({"path": "./nowhere"}, r"there is no /.*nowhere"),
    ],
)
def test_the_error_for_a_missing_column_split_or_file_has_the_key(tmp_path, hf, no_network, arguments, message):
    hf.Dataset.from_dict(rows(2, label=[0, 1], boxes=[[1], [2]])).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message):
        HuggingFaceImages(**{"path": str(tmp_path / "x.parquet")} | arguments)


def test_the_error_for_a_missing_package_has_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'jepa-train\[hf\]'"):
        HuggingFaceImages(path="anything")


@CIFAR
def test_the_parquet_files_of_cifar10_are_read_without_further_arguments(hf, no_network):
    images = HuggingFaceImages(path=str(SHARED / "cifar10"))
    held_out = images.validation()
    assert held_out is not None
    assert (len(images), len(held_out), len(images.classes)) == (50000, 10000, 10)
    assert images.classes[1] == "automobile"
    assert images[0][0].shape == (3, 1, 32, 32)


def write_idx(path: Path, values: np.ndarray) -> None:
    """The file format of MNIST: a magic number, the sizes, the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">{1 + values.ndim}i", 0x800 + values.ndim, *values.shape) + values.tobytes())


def test_torchvision_data_sets_are_clips_in_memory_with_their_test_part_held_out(tmp_path):
    digits = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for part, count in (("train", 5), ("t10k", 2)):
        write_idx(tmp_path / "MNIST" / "raw" / f"{part}-images-idx3-ubyte", digits[:count])
        write_idx(tmp_path / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8))
    images = TorchvisionImages(name="mnist", root_path=str(tmp_path), download=False)
    held_out = images.validation()
    assert held_out is not None
    assert (len(images), len(held_out), len(images.classes), images.channels) == (5, 2, 10, 1)
    assert np.array_equal(images[3][0][0, 0].numpy(), digits[3])
    assert images[3][1] == 3
    assert held_out.describe(1) == "mnist test 1"
    assert images.in_memory


def test_the_error_for_a_missing_torchvision_data_set_has_name_and_folder(tmp_path):
    with pytest.raises(ValueError, match=f"cifar10.*download=false: not in {tmp_path}"):
        TorchvisionImages(name="cifar10", root_path=str(tmp_path), download=False)
    with pytest.raises(ValueError, match=r'name=cifar: no such name; did you mean "cifar10".*valid: cifar10, cifar100'):
        checked(TorchvisionImages, name="cifar", root_path=str(tmp_path), download=False)
