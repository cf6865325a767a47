"""Values of pixels: formats x depths x bands, against the arrays that were written."""

import io
import logging
import struct
import tarfile
import zlib
from contextlib import suppress

import numpy as np
import pytest
from checked import checked
from PIL import Image

from jepa.data import tiff
from jepa.data.decode import decode
from jepa.data.frames import FrameFolders
from jepa.data.huggingface import HuggingFaceImages
from jepa.data.images import ImageFolder
from jepa.data.shards import Shards

SHAPE = (6, 8)
DEEP = np.random.default_rng(0).integers(0, 65536, SHAPE, dtype=np.uint16)
DEEP_COLOURS = np.random.default_rng(1).integers(0, 65536, (*SHAPE, 3), dtype=np.uint16)
TWELVE, TWELVE_COLOURS = DEEP >> 4, DEEP_COLOURS >> 4


def save(values: np.ndarray, kind: str, mode: str | None = None, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values, mode).save(stream, kind, **options)
    return stream.getvalue()


def pnm(magic: str, maxval: int, values: np.ndarray) -> bytes:
    head = f"{magic}\n# a comment\n{values.shape[1]} {values.shape[0]}\n{maxval}\n".encode()
    if magic in ("P2", "P3"):
        return head + " ".join(map(str, values.ravel().tolist())).encode()
    return head + values.astype(">u2" if maxval > 255 else np.uint8).tobytes()


def png(values: np.ndarray, colour_type: int, **chunks: bytes) -> bytes:
    """A PNG of 16 bits."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))]
    parts += [(name.encode(), data) for name, data in chunks.items()]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff_file(values: np.ndarray, *, order: str = "<", bits: int = 0, photometric: int = 1, strip: bytes = b"", **tags):
    """An uncompressed TIFF in one strip; `tags` are extra (338), sample_format (339), planar (284), largest (281)."""
    height, width = values.shape[:2]
    bands = values.shape[2] if values.ndim == 3 else 1
    strip = strip or values.astype(values.dtype.newbyteorder(order)).tobytes()
    numbers = {"extra": 338, "sample_format": 339, "planar": 284, "largest": 281, "orientation": 274}
    entries = {256: [width], 257: [height], 258: [bits or 8 * values.itemsize] * bands, 259: [1], 262: [photometric]}
    entries |= {273: [0], 277: [bands], 278: [height], 279: [len(strip)]}
    entries |= {numbers[name]: np.atleast_1d(value).tolist() for name, value in tags.items()}
    begin_extra = 8 + 2 + 12 * len(entries) + 4
    overflow, rows = b"", b""
    sizes = {tag: 2 * len(entry) for tag, entry in entries.items() if len(entry) > 2}
    entries[273] = [begin_extra + sum(sizes.values())]
    for tag, entry in sorted(entries.items()):
        data = struct.pack(f"{order}{len(entry)}H", *entry)
        where = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack(f"{order}I", begin_extra + len(overflow))
        overflow += data if len(data) > 4 else b""
        rows += struct.pack(f"{order}HHI", tag, 3, len(entry)) + where
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return head + rows + bytes(4) + overflow + strip


def pixels(data: bytes, **options) -> np.ndarray:
    """uint8 [H, W, C]"""
    return decode(data, **options)[:, 0].permute(1, 2, 0).numpy()


def packed(values: np.ndarray) -> bytes:
    """Two values of 12 bits in three bytes."""
    first, second = values.reshape(-1, 2).astype(int).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()


FULL_RANGE = {
    "PNG": save(DEEP, "PNG"),
    "PNG with sBIT, whose values are scaled up": png(DEEP, 0, sBIT=bytes([12])),
    "PNG with alpha": png(np.stack([DEEP, DEEP[::-1]], -1), 4),
    "PGM": save(DEEP, "PPM"),
    "plain PGM": pnm("P2", 65535, DEEP),
    "TIFF": save(DEEP, "TIFF"),
    "compressed TIFF": save(DEEP, "TIFF", compression="tiff_adobe_deflate"),
    "big-endian TIFF": tiff_file(DEEP, order=">"),
    "TIFF where white is zero": tiff_file(65535 - DEEP, photometric=0),
    "TIFF with the largest value of its pixels": tiff_file(DEEP, largest=int(DEEP.max())),
    "JPEG 2000": save(DEEP, "JPEG2000", irreversible=False),
}


@pytest.mark.parametrize("name", FULL_RANGE)
def test_grey_of_16_bits_keeps_its_upper_eight(name):
    expected = np.repeat((DEEP >> 8)[..., None], 3, axis=-1)
    assert np.array_equal(pixels(FULL_RANGE[name]), expected)


DECLARED = {
    "PGM": pnm("P5", 4095, TWELVE),
    "plain PGM": pnm("P2", 4095, TWELVE),
    "TIFF of 12 bits": tiff_file(TWELVE, bits=12, strip=packed(TWELVE)),
    "TIFF with MaxSampleValue": tiff_file(TWELVE, largest=4095),
    "big-endian TIFF with MaxSampleValue": tiff_file(TWELVE, order=">", largest=4095),
    "TIFF of 12 bits where white is zero": tiff_file(4095 - TWELVE, photometric=0, largest=4095),
}


@pytest.mark.parametrize("name", DECLARED)
def test_the_range_that_a_file_declares_is_used(name):
    assert np.array_equal(pixels(DECLARED[name])[..., 0], TWELVE >> 4)


UNDECLARED = {
    "PNG": save(TWELVE, "PNG"),
    "PGM": pnm("P5", 65535, TWELVE),
    "TIFF": tiff_file(TWELVE),
    "big-endian TIFF": tiff_file(TWELVE, order=">"),
    "compressed TIFF": save(TWELVE, "TIFF", compression="tiff_lzw"),
    "signed TIFF": tiff_file(TWELVE.astype(np.int16), sample_format=2),
    "TIFF of 32 bits": tiff_file(TWELVE.astype(np.uint32)),
    "floating-point TIFF": tiff_file(TWELVE.astype(np.float32), sample_format=3),
    "floating-point TIFF where white is zero": tiff_file(
        4095 - TWELVE.astype(np.float32), sample_format=3, photometric=0
    ),
    "JPEG 2000": save(TWELVE, "JPEG2000", irreversible=False),
}


@pytest.mark.parametrize("name", UNDECLARED)
def test_max_value_is_the_value_of_white(name):
    difference = pixels(UNDECLARED[name], max_value=4095)[..., 0].astype(int) - (TWELVE >> 4)
    assert abs(difference).max() <= ("white is zero" in name)


COLOURS = {
    "PNG": png(DEEP_COLOURS, 2),
    "PPM": pnm("P6", 65535, DEEP_COLOURS),
    "plain PPM": pnm("P3", 65535, DEEP_COLOURS),
    "TIFF": tiff_file(DEEP_COLOURS, photometric=2),
    "big-endian TIFF": tiff_file(DEEP_COLOURS, photometric=2, order=">"),
    "TIFF with alpha": tiff_file(np.dstack([DEEP_COLOURS, DEEP]), photometric=2, extra=2),
}


@pytest.mark.parametrize("name", COLOURS)
def test_colours_of_16_bits_keep_their_upper_eight_and_follow_max_value_with_all_bits(name):
    assert np.array_equal(pixels(COLOURS[name]), DEEP_COLOURS >> 8)
    twice = np.minimum(DEEP_COLOURS.astype(int) * 256 // 32767, 255)
    assert np.array_equal(pixels(COLOURS[name], max_value=32767), twice)


def test_colours_of_16_bits_follow_max_value_without_decoders_of_torchvision(monkeypatch):
    monkeypatch.setattr("jepa.data.decode._FAST", {})
    assert np.array_equal(pixels(png(TWELVE_COLOURS, 2), max_value=4095), TWELVE_COLOURS >> 4)
    assert np.array_equal(pixels(save(DEEP, "PNG"))[..., 0], DEEP >> 8)


def test_a_declared_range_of_colours_is_used():
    assert np.array_equal(pixels(pnm("P6", 4095, TWELVE_COLOURS)), TWELVE_COLOURS >> 4)
    file = tiff_file(TWELVE_COLOURS, photometric=2, largest=[4095] * 3)
    assert np.array_equal(pixels(file), TWELVE_COLOURS >> 4)


def test_cmyk_of_16_bits_follows_max_value_as_that_of_8_bits():
    inks = np.dstack([TWELVE_COLOURS, TWELVE])
    eight = tiff_file((inks >> 4).astype(np.uint8), photometric=5)
    assert np.array_equal(pixels(tiff_file(inks, photometric=5), max_value=4095), pixels(eight))


def test_images_of_8_bits_and_fewer_do_not_follow_max_value():
    for data in (save((DEEP >> 8).astype(np.uint8), kind) for kind in ("PNG", "TIFF", "BMP", "PPM", "JPEG", "GIF")):
        assert np.array_equal(pixels(data, max_value=1000), pixels(data))
    bits = DEEP > 30000
    assert np.array_equal(pixels(save(bits, "TIFF"), max_value=1000)[..., 0], bits * np.uint8(255))


def test_not_a_number_is_black_and_values_out_of_range_are_black_or_white():
    values = np.array([[np.nan, -1, 0.5, 2, np.inf, -np.inf]], dtype=np.float32)
    file = tiff_file(values, sample_format=3)
    assert pixels(file, max_value=1)[0, :, 0].tolist() == [0, 0, 128, 255, 255, 0]


def test_alpha_is_dropped():
    colours = (DEEP_COLOURS >> 8).astype(np.uint8)
    alpha = (DEEP >> 8).astype(np.uint8)
    for extra in ({}, {"extra": 0}, {"extra": 2}):
        assert np.array_equal(pixels(tiff_file(np.dstack([colours, alpha]), photometric=2, **extra)), colours)
    assert np.array_equal(pixels(tiff_file(np.dstack([alpha, 255 - alpha]), extra=2))[..., 0], alpha)
    assert pixels(tiff_file(np.dstack([alpha, np.full_like(alpha, 255)]), extra=1)).shape == (*SHAPE, 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(("photometric", "bands"), [(1, n) for n in range(2, 17)] + [(2, n) for n in range(5, 17)])
def test_bands_without_a_meaning_as_colours_are_refused_with_their_number(photometric, bands, dtype):
    values = np.ones((*SHAPE, bands), dtype)
    for extra in ({}, {"extra": [0] * (bands - (1 if photometric == 1 else 3))}):
        with pytest.raises(OSError, match=f"a TIFF of {bands} bands; save it with 1"):
            decode(tiff_file(values, photometric=photometric, **extra))


REFUSED = {
    "signed 8 bits": (tiff_file(np.ones(SHAPE, np.int8), sample_format=2), "signed values"),
    "planes": (tiff_file(DEEP_COLOURS, photometric=2, planar=2), "16 bits in separate planes"),
    "signed 16 bits": (UNDECLARED["signed TIFF"], r"signed.*set dataset\.max_value"),
    "32 bits": (UNDECLARED["TIFF of 32 bits"], r"32 bits: set dataset\.max_value"),
    "float": (UNDECLARED["floating-point TIFF"], r"floating-point numbers: set dataset\.max_value"),
    "double": (tiff_file(np.ones(SHAPE), sample_format=3), "1 band of 64 bits that Pillow cannot read"),
    "14 bits": (tiff_file(DEEP, bits=14), "1 band of 14 bits"),
    "inverted big-endian": (tiff_file(DEEP, order=">", photometric=0), "1 band of 16 bits"),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(40), "of the type heic; save it as JPEG or PNG"),
    "text": (b"no image at all", "no known type"),
    "nothing": (b"", "an empty file"),
    "cut off": (tiff_file(DEEP)[:40], "not a readable image"),
    "cut off JPEG": (save((DEEP_COLOURS >> 8).astype(np.uint8), "JPEG")[:300], "not a readable image: .*incomplete"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_rightly_is_refused_in_plain_words(name):
    data, message = REFUSED[name]
    with pytest.raises(OSError, match=message) as refusal:
        decode(data)
    assert "BytesIO" not in str(refusal.value)
    assert ".cpp" not in str(refusal.value)


@pytest.mark.parametrize("place", [0.3, 0.5, 0.9])
def test_a_png_with_a_flipped_bit_is_refused_and_does_not_end_the_process(place):
    data = bytearray(save((DEEP_COLOURS >> 8).astype(np.uint8), "PNG"))
    data[int(place * len(data))] ^= 4
    with pytest.raises(OSError, match="a damaged PNG"):
        decode(bytes(data))


def test_a_damaged_comment_of_a_png_does_no_harm():
    data = png(DEEP, 0, tEXt=b"Comment\0good").replace(b"good", b"goof")
    assert np.array_equal(pixels(data)[..., 0], DEEP >> 8)


def test_damaged_files_of_more_than_8_bits_raise_oserror_or_runtimeerror():
    random = np.random.default_rng(0)
    for data in [*FULL_RANGE.values(), *DECLARED.values(), *UNDECLARED.values(), *COLOURS.values()] * 4:
        damaged = bytearray(data)
        damaged[random.integers(8, min(170, len(data)))] = random.integers(256)
        for max_value in (None, 4095):
            with suppress(OSError, RuntimeError):
                decode(bytes(damaged), max_value=max_value)


def test_a_tiff_is_read_beyond_the_limit_of_pillow_up_to_one_of_our_own(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert pixels(tiff_file(DEEP)).shape == (*SHAPE, 3)
    with pytest.raises(OSError, match="more than 179 megapixels; scale it down"):
        decode(save((DEEP >> 8).astype(np.uint8), "BMP"))
    monkeypatch.setattr(tiff, "MAX_PIXELS", 40)
    with pytest.raises(OSError, match="a TIFF of 48 pixels, more than 40"):
        decode(tiff_file(DEEP))


def test_images_of_16_bits_are_turned_by_their_orientation():
    upright = pixels(tiff_file(TWELVE_COLOURS, photometric=2, orientation=6), max_value=4095)
    assert np.array_equal(upright, np.rot90(TWELVE_COLOURS >> 4, -1))


def folder_of(tmp_path, data: bytes, suffix: str, count: int = 3):
    for number in range(count):
        path = tmp_path / "train" / "a" / f"{number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return {"root_path": str(tmp_path), "image_folder": "train"}


@pytest.mark.parametrize(
    ("data", "white"),
    [(save(TWELVE, "PNG"), 4095), (png(TWELVE_COLOURS, 2), 4095), (tiff_file(TWELVE >> 2), 1023),
     (tiff_file(TWELVE_COLOURS, photometric=2), 4095), (pnm("P5", 65535, DEEP >> 2), 16383),
     (tiff_file(DEEP >> 8), 255)],
)  # fmt: skip
def test_dark_images_of_16_bits_are_warned_of_once_with_the_key_that_fixes_them(tmp_path, caplog, data, white):
    arguments = folder_of(tmp_path, data, "png")
    images = ImageFolder(**arguments)
    assert [images[i][0].max() < 64 for i in range(3)]
    assert caplog.text.count("WARNING") == 1
    assert f"train/a/0.png has 16 bits and no value above {white}" in caplog.text
    assert f"set dataset.max_value={white}" in caplog.text
    caplog.clear()
    assert ImageFolder(**arguments, max_value=white)[0][0].max() > 240
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("data", [save(DEEP, "PNG"), save((DEEP >> 12).astype(np.uint8), "PNG"), DECLARED["PGM"], b"?"])
def test_no_other_images_are_warned_of(tmp_path, caplog, data):
    ImageFolder(**folder_of(tmp_path, data, "png"))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_every_data_set_of_images_has_the_key(tmp_path, caplog):
    data = save(TWELVE, "PNG")
    arguments = folder_of(tmp_path, data, "png")
    shard = tmp_path / "train-0.tar"
    with tarfile.open(shard, "w") as tar:
        tar.add(tmp_path / "train" / "a" / "0.png", "0.png")
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"image": [{"bytes": data, "path": "0.png"}]}).to_parquet(tmp_path / "x.parquet")
    data_sets = {
        FrameFolders: {**arguments, "num_frames": 2, "val_ratio": 0.0},
        Shards: {"shards": str(shard)},
        HuggingFaceImages: {"path": str(tmp_path / "x.parquet")},
    }
    for number, (kind, values) in enumerate(data_sets.items(), 1):
        with caplog.at_level(logging.WARNING):
            kind(**values)
        assert caplog.text.count("set dataset.max_value=4095") == number
        assert np.array_equal(kind(**values, max_value=4095)[0][0][0, 0].numpy(), TWELVE >> 4)


def test_the_key_is_a_positive_number(tmp_path):
    with pytest.raises(ValueError, match="max_value"):
        checked(ImageFolder, **folder_of(tmp_path, save(DEEP, "PNG"), "png"), max_value=0)


def test_a_frame_that_cannot_be_read_is_named(tmp_path):
    frames = FrameFolders(**folder_of(tmp_path, save(DEEP, "PNG"), "png"), num_frames=3, val_ratio=0.0)
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"1\.png: not a readable image"):
        frames[0]


ROWS = b"".join(b"\0" + bytes(range(24)) for _ in range(8))
DAMAGED_PIXELS = {
    "no zlib stream": b"no zlib stream",
    "too few rows": zlib.compress(ROWS[:70]),
    "stream cut off": zlib.compress(ROWS)[:30],
    "unknown filter": zlib.compress(b"\x09" + ROWS[1:]),
    "nothing": b"",
}


def png_of(pixels_chunk: bytes, side: int = 8) -> bytes:
    """A PNG of colours with right checksums around any bytes in place of its pixels."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", head), (b"IDAT", pixels_chunk), (b"IEND", b"")):
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data


@pytest.mark.parametrize("damage", DAMAGED_PIXELS)
def test_damaged_pixels_of_a_png_under_right_checksums_are_refused(damage):
    assert decode(png_of(zlib.compress(ROWS))).flatten(2)[:, 0, 0].tolist() == [0, 1, 2]
    with pytest.raises(OSError, match=r"image|stream"):
        decode(png_of(DAMAGED_PIXELS[damage]))


@pytest.mark.parametrize("side", [30_000, 2**31 - 1])
def test_a_png_that_claims_too_many_pixels_is_refused_without_their_memory(side):
    with pytest.raises(OSError, match=r"a PNG of [\d,]+ pixels"):
        decode(png_of(zlib.compress(ROWS), side))
