"""What real annotation files of boxes hold: used, left out with a count, or refused by file and entry."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from coco_folder import CATEGORIES, GOOD_BOX, IMAGES, coco, write_coco
from PIL import Image
from voc_folder import HEIGHT, WIDTH, picture, voc, write_voc, xml

from jepa.data.box_files import _number
from jepa.data.boxes import COCO
from jepa.data.decode import decode, read_header

ORIENTATION = 274
TURNS = range(1, 9)
BOX = (12, 4, 50, 14)
"""left, top, right, bottom in the upright image"""
UNTURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip
"""How the pixels of an upright image are stored under each EXIF orientation."""


def turned(orientation: int, kind: str = "PNG", size: tuple[int, int] = (HEIGHT, WIDTH)) -> tuple[bytes, list[int]]:
    """A black image with a white rectangle at BOX once it is upright, and the edges of the rectangle as stored."""
    pixels = np.zeros(size, dtype=np.uint8)
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255
    image, exif, file = Image.fromarray(pixels).convert("RGB"), Image.Exif(), io.BytesIO()
    image = image.transpose(UNTURNED[orientation]) if orientation > 1 else image
    exif[ORIENTATION] = orientation
    image.save(file, kind, exif=exif)
    left, top, right, bottom = image.getbbox() or ()
    return file.getvalue(), [left, top, right, bottom]


def white(clip) -> list[int]:
    rows, columns = (np.flatnonzero((clip[0, 0].numpy() > 127).any(axis=axis)) for axis in (1, 0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def stored_size(orientation: int) -> tuple[int, int]:
    return (WIDTH, HEIGHT) if orientation >= 5 else (HEIGHT, WIDTH)


def coco_of(root: Path, orientation: int, edges, size: tuple[int, int] | None, **changes) -> COCO:
    """A data set of one image of that orientation."""
    height, width = size or (None, None)
    box = GOOD_BOX | {"bbox": [edges[0], edges[1], edges[2] - edges[0], edges[3] - edges[1]]}
    write_coco(root, [box], images=[{"id": 7, "file_name": "7.png", "height": height, "width": width}])
    (root / "pictures" / "7.png").write_bytes(turned(orientation)[0])
    return coco(root, **changes)


# the EXIF orientation


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_the_header_has_the_size_as_stored_and_the_turn_that_the_decoder_makes(kind, orientation, tmp_path):
    data, _ = turned(orientation, kind)
    (tmp_path / "a").write_bytes(data)
    assert read_header(tmp_path / "a") == (stored_size(orientation), orientation)
    assert white(decode(data)) == pytest.approx(BOX, abs=1 if kind in ("JPEG", "WEBP") else 0)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("reading", ["stored", "turned"])
def test_boxes_lie_on_their_pixels_however_the_image_is_turned(orientation, reading, tmp_path):
    edges = turned(orientation)[1] if reading == "stored" else BOX
    dataset = coco_of(tmp_path, orientation, edges, None, exif=reading)
    clip, _, fields = dataset[0]
    assert white(clip) == fields["boxes"][0, :4].tolist() == [*BOX]


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("reading", ["stored", "turned"])
def test_the_annotated_size_says_which_pixels_boxes_count(orientation, reading, tmp_path, caplog):
    edges, size = (turned(orientation)[1], stored_size(orientation)) if reading == "stored" else (BOX, (HEIGHT, WIDTH))
    assert coco_of(tmp_path, orientation, edges, size)[0].fields["boxes"][0, :4].tolist() == [*BOX]
    assert f"1 images with an EXIF orientation, boxes taken as {reading} (by their annotated sizes)" in caplog.text


def test_the_annotated_size_of_voc_says_it_too(tmp_path):
    data, edges = turned(6)
    root = write_voc(tmp_path, {"a": xml(("ant", *edges), size=(WIDTH, HEIGHT)), "b": xml(("ant", *BOX))}, {})
    for name in "ab":
        (root / "JPEGImages" / f"{name}.png").write_bytes(data)
    dataset = voc(root, split=None, val_split=None)
    assert [dataset[index].fields["boxes"][0, :4].tolist() for index in range(2)] == [[*BOX]] * 2


def test_where_no_size_tells_boxes_are_taken_as_turned_and_the_log_says_so(tmp_path, caplog):
    for number, (orientation, size) in enumerate([(6, None), (3, (HEIGHT, WIDTH))]):
        dataset = coco_of(tmp_path / str(number), orientation, BOX, size)
        assert dataset[0].fields["boxes"][0, :4].tolist() == [*BOX]
        assert caplog.text.count("1 images with an EXIF orientation, boxes taken as turned (assumed)") == number + 1


def test_where_no_size_tells_boxes_are_taken_as_those_of_most_other_images(tmp_path, caplog):
    (data, edges), (upside_down, reversed_edges) = turned(6), turned(3)
    files = {"a": xml(("ant", *edges), size=(WIDTH, HEIGHT)), "b": xml(("ant", *reversed_edges))}
    root = write_voc(tmp_path, files, {})
    (root / "JPEGImages" / "a.png").write_bytes(data)
    (root / "JPEGImages" / "b.png").write_bytes(upside_down)
    assert voc(root, split=None, val_split=None)[1].fields["boxes"][0, :4].tolist() == [*BOX]
    assert "1 images with an EXIF orientation, boxes taken as stored (assumed)" in caplog.text


def test_without_an_exif_orientation_a_size_with_its_sides_exchanged_is_another_size(tmp_path, caplog):
    files = {"a": xml(("ant", 1, 1, 9, 9), size=(WIDTH, HEIGHT)), "b": xml(("ant", 1, 1, 9, 9))}
    assert len(voc(write_voc(tmp_path, files, {}), split=None, val_split=None)) == 1
    path = tmp_path / "JPEGImages" / "a.png"
    reason = f"(the first: {path} has 60x40 pixels, its annotation says 40x60)"
    assert f"1 images of another size than annotated left out {reason}" in caplog.text


# entries of COCO

LEFT_OUT = {
    "bbox null": ({"bbox": None}, "annotations without four numbers as bbox"),
    "no bbox": ({"bbox": ...}, "annotations without four numbers as bbox"),
    "two numbers": ({"bbox": [1, 2]}, "annotations without four numbers as bbox"),
    "a text of four digits": ({"bbox": "1234"}, "annotations without four numbers as bbox"),
    "a mapping of four": ({"bbox": {"1": 1, "2": 2, "3": 3, "4": 4}}, "annotations without four numbers as bbox"),
    "a null inside": ({"bbox": [1, 2, None, 4]}, "annotations without four numbers as bbox"),
    "truth inside": ({"bbox": [1, 2, True, 4]}, "annotations without four numbers as bbox"),
    "nan": ({"bbox": [1, float("nan"), 3, 4]}, "annotations without four numbers as bbox"),
    "infinity": ({"bbox": [1, 2, float("inf"), 4]}, "annotations without four numbers as bbox"),
    "a huge number": ({"bbox": [1, 2, 10**400, 4]}, "annotations without four numbers as bbox"),
    "no width": ({"bbox": [1, 2, 0, 4]}, "boxes without area"),
    "a negative height": ({"bbox": [1, 2, 3, -4]}, "boxes without area"),
    "outside": ({"bbox": [WIDTH, 2, 3, 4]}, "boxes outside of the image"),
    "category null": ({"category_id": None}, "annotations of a category that is not listed"),
    "unknown category": ({"category_id": 99}, "annotations of a category that is not listed"),
    "a list as category": ({"category_id": [3]}, "annotations of a category that is not listed"),
    "unknown image": ({"image_id": 99}, "annotations of an image that is not listed"),
    "image null": ({"image_id": None}, "annotations of an image that is not listed"),
}


@pytest.mark.parametrize(("change", "reason"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_an_annotation_that_cannot_be_used_is_left_out_and_named(change, reason, tmp_path, caplog):
    bad = {key: value for key, value in (GOOD_BOX | {"id": 4} | change).items() if value is not ...}
    dataset = coco(write_coco(tmp_path, [GOOD_BOX, bad]))
    assert [len(dataset[index].fields["boxes"]) for index in range(2)] == [1, 0]
    (record,) = caplog.records
    entry = "7.png" if reason.startswith("boxes") else "annotation 4"
    assert record.message.endswith(f"1 {reason} left out (the first: {entry})")
    assert f"{tmp_path / 'all.json'}: 2 images, 1 boxes of 2 classes; " in record.message


@pytest.mark.parametrize(
    "change",
    [
        {"bbox": ["1", "2", "3.0", "4"]}, {"category_id": "3"}, {"category_id": 3.0}, {"image_id": "7"}, {"id": None},
        {"iscrowd": None}, {"iscrowd": "0"}, {"iscrowd": False},
    ],
)  # fmt: skip
def test_other_spellings_of_the_same_are_used(change, tmp_path, caplog):
    assert coco(write_coco(tmp_path, [GOOD_BOX | change]))[0].fields["boxes"].tolist() == [[1, 2, 4, 6, 0]]
    assert not caplog.records


@pytest.mark.parametrize("flag", [1, True, "1", "true"])
def test_crowds_are_left_out_however_the_flag_is_spelled(flag, tmp_path):
    assert len(coco(write_coco(tmp_path, [GOOD_BOX | {"iscrowd": flag}]))[0].fields["boxes"]) == 0


@pytest.mark.parametrize("side", [None, ..., 0, -1, "?", float("nan"), 10**400, [40], True, 40.5])
def test_the_size_of_the_file_is_used_where_the_annotation_has_none(side, tmp_path):
    images = [{key: v for key, v in (entry | {"height": side}).items() if v is not ...} for entry in IMAGES]
    box = GOOD_BOX | {"bbox": [1, 2, 300, 400]}
    assert coco(write_coco(tmp_path, [box], images=images))[0].fields["boxes"].tolist() == [[1, 2, WIDTH, HEIGHT, 0]]


@pytest.mark.parametrize("size", [(str(HEIGHT), f" {WIDTH}"), (float(HEIGHT), WIDTH)])
def test_sizes_as_text_or_fractions_are_used(size, tmp_path, caplog):
    images = [entry | {"height": size[0], "width": size[1]} for entry in IMAGES]
    assert len(coco(write_coco(tmp_path, [GOOD_BOX], images=images))) == 2
    assert not caplog.records


@pytest.mark.parametrize(
    "entry",
    [
        None, 3, {}, {"id": 8}, {"id": None, "file_name": "8.png"}, {"id": 8, "file_name": None},
        {"id": [8], "file_name": "8.png"},
    ],
)  # fmt: skip
def test_an_image_without_id_or_name_is_left_out(entry, tmp_path, caplog):
    assert len(coco(write_coco(tmp_path, [GOOD_BOX], images=[*IMAGES, entry]))) == 2
    assert "1 images without id or file_name left out (the first: entry 2 of images)" in caplog.text


@pytest.mark.parametrize("name", ["8.png", "no/8.png", "", "\0", "\ud800", "a" * 5000, "/dev/zero", "../pictures"])
def test_one_image_without_a_file_is_left_out_and_all_are_refused(name, tmp_path, caplog):
    root = write_coco(tmp_path, [GOOD_BOX], images=[*IMAGES, {"id": 8, "file_name": name}])
    assert len(coco(root)) == 2
    assert "1 images without" in caplog.text
    (root / "pictures" / "7.png").unlink()
    (root / "pictures" / "9.png").unlink()
    with pytest.raises(
        ValueError, match=r"all\.json: no image is left; .*images without a file left out \(the first: .*7"
    ):
        coco(root)


def test_an_image_that_cannot_be_read_is_left_out_and_all_are_refused(tmp_path, caplog):
    root = write_coco(tmp_path, [GOOD_BOX])
    (root / "pictures" / "9.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert len(coco(root)) == 1
    assert f"1 images that cannot be read left out (the first: {root / 'pictures' / '9.png'}: " in caplog.text
    (root / "pictures" / "7.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"all\.json: no image is left; 2 images that cannot be read .*7\.png: an empty"
    ):
        coco(root)


def test_an_image_listed_twice_is_one_image_with_the_boxes_of_both(tmp_path, caplog):
    images = [*IMAGES, IMAGES[0], IMAGES[0] | {"id": 8}]
    dataset = coco(write_coco(tmp_path, [GOOD_BOX, GOOD_BOX | {"image_id": 8}], images=images))
    assert [len(dataset[index].fields["boxes"]) for index in range(len(dataset))] == [2, 0]
    assert "2 images listed again, taken as one (the first: 7.png)" in caplog.text


def test_categories_of_one_name_are_one_class(tmp_path, caplog):
    categories = [*CATEGORIES, {"id": 8, "name": "cat"}]
    dataset = coco(write_coco(tmp_path, [GOOD_BOX, GOOD_BOX | {"category_id": 8}], categories))
    assert dataset.classes == ("cat", "owl")
    assert dataset[0].fields["boxes"][:, 4].tolist() == [0, 0]
    assert "1 categories of several ids taken as one class (the first: cat)" in caplog.text


@pytest.mark.parametrize(
    ("ids", "classes"),
    [
        (["b", "a"], ("y", "x")), (["10", "9"], ("y", "x")), ([10, "9"], ("y", "x")), (["a", 3], ("y", "x")),
        ([-1, 0], ("x", "y")),
    ],
)  # fmt: skip
def test_category_ids_may_be_text_and_are_ordered_as_numbers_where_they_are(ids, classes, tmp_path):
    categories = [{"id": key, "name": name} for key, name in zip(ids, "xy", strict=True)]
    assert coco(write_coco(tmp_path, [GOOD_BOX | {"category_id": ids[0]}], categories)).classes == classes


REFUSED = {
    "a category without a name": ({"categories": [{"id": 1, "name": None}]}, "entry 0 of categories has no name"),
    "a category without an id": ({"categories": [{"name": "x"}]}, "entry 0 of categories has no id"),
    "a category of null": ({"categories": [CATEGORIES[0], None]}, "entry 1 of categories has no id"),
    "two names of a category": ({"categories": [*CATEGORIES, {"id": 3, "name": "x"}]}, "id 3 stands for cat and x"),
    "two files of an image": ({"images": [*IMAGES, IMAGES[0] | {"file_name": "x"}]}, "id 7 stands for 7.png and x"),
    "no images": ({"images": []}, "no image is left"),
    "images null": ({"images": None}, "has no list of images"),
    "annotations as mapping": ({"annotations": {}}, "has no list of annotations"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_has_two_meanings_or_none_is_refused_with_the_entry(change, reason, tmp_path):
    root = write_coco(tmp_path, [GOOD_BOX])
    (root / "all.json").write_text(json.dumps(json.loads((root / "all.json").read_text()) | change))
    with pytest.raises(ValueError, match=rf"all\.json: .*{reason}"):
        coco(root)


@pytest.mark.parametrize("boxes", [None, [], [None], [GOOD_BOX | {"bbox": None}]])
def test_a_training_part_without_boxes_has_nothing_for_a_detector_and_its_images_for_others(boxes, tmp_path):
    dataset = coco(write_coco(tmp_path, boxes))
    assert len(dataset) == 2
    assert not dataset.fields
    assert coco(write_coco(tmp_path, [GOOD_BOX])).fields


# entries of VOC

VOC_OBJECTS = {
    "no bndbox": ("<name>ant</name>", "objects without numbers as xmin, ymin, xmax, ymax in bndbox"),
    "empty edges": ("<name>ant</name><bndbox><xmin/><ymin/><xmax/><ymax/></bndbox>", "objects without numbers"),
    "a word": (
        "<name>ant</name><bndbox><xmin>x</xmin><ymin>1</ymin><xmax>2</xmax><ymax>3</ymax></bndbox>",
        "objects without numbers",
    ),
    "no name": ("<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>3</ymax></bndbox>", "objects without a name"),
    "an empty name": ("<name> </name><bndbox/>", "objects without a name"),
}


@pytest.mark.parametrize(("text", "reason"), VOC_OBJECTS.values(), ids=VOC_OBJECTS)
def test_an_object_of_voc_that_cannot_be_used_is_left_out_and_named(text, reason, tmp_path, caplog):
    whole = xml(("ant", 1, 1, 9, 9)).replace("</annotation>", f"<object>{text}</object></annotation>")
    dataset = voc(write_voc(tmp_path, {"a": whole}, {"train": ["a"]}), val_split=None)
    assert len(dataset[0].fields["boxes"]) == 1
    assert dataset.classes == ("ant",)
    assert f"1 {reason}" in caplog.text
    assert f"left out (the first: {tmp_path / 'Annotations' / 'a.xml'})" in caplog.text


def test_images_of_voc_without_a_file_are_left_out_and_all_are_refused(tmp_path, caplog):
    box = xml(("ant", 1, 1, 9, 9))
    root = write_voc(tmp_path, {"a": box, "b": box}, {"train": ["a", "b", "a"], "val": ["a"]})
    (root / "JPEGImages" / "a.png").unlink()
    assert len(voc(root, val_split=None)) == 1
    assert f"1 images without a file left out (the first: {root / 'JPEGImages' / 'a'} with one of .jpg" in caplog.text
    with pytest.raises(ValueError, match=r", val: no image is left; 1 images without a file"):
        voc(root)


def test_a_name_that_a_split_lists_twice_is_one_image(tmp_path):
    root = write_voc(tmp_path, {"a": xml(("ant", 1, 1, 9, 9))}, {"train": ["a", "a"]})
    assert len(voc(root, val_split=None)) == 1


@pytest.mark.parametrize(("flag", "count"), [("1", 0), (" 1 ", 0), ("true", 0), ("0", 1), ("", 1), ("false", 1)])
def test_difficult_objects_are_known_however_the_flag_is_spelled(flag, count, tmp_path):
    text = xml(("ant", 1, 1, 9, 9), extra=f"<difficult>{flag}</difficult>")
    root = write_voc(tmp_path, {"a": text}, {"train": ["a"]})
    assert len(voc(root, val_split=None, classes=["ant"])[0].fields["boxes"]) == count


@pytest.mark.parametrize("value", [None, [], {}, True, "x", "", 10**400])
def test_what_is_no_number_is_nan(value):
    assert np.isnan(_number(value))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "latin-1"])
def test_entities_are_refused_unread_in_every_encoding(encoding, tmp_path):
    bomb = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12))
    text = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE a [<!ENTITY a0 "é">{bomb}]><a>&a11;</a>'
    root = write_voc(tmp_path, {"a": ""}, {"train": ["a"]})
    (root / "Annotations" / "a.xml").write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=r"a\.xml: has a document type \(<!DOCTYPE\)"):
        voc(root, val_split=None)


def test_an_orientation_that_the_decoder_does_not_see_is_none(tmp_path):
    file = io.BytesIO()
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    Image.new("RGB", (WIDTH, HEIGHT)).save(file, "JPEG", xmp=xmp)
    (tmp_path / "a").write_bytes(file.getvalue())
    assert read_header(tmp_path / "a") == ((HEIGHT, WIDTH), 1)
    assert decode(file.getvalue()).shape[-2:] == (HEIGHT, WIDTH)


def test_damaged_exif_leaves_the_image_readable(tmp_path):
    data = turned(1, "JPEG")[0]
    assert b"MM\0*" in data
    (tmp_path / "a").write_bytes(data.replace(b"MM\0*", b"MM\0?"))
    assert read_header(tmp_path / "a") == ((HEIGHT, WIDTH), 1)


def test_the_file_of_a_picture_is_not_decoded_for_its_header(tmp_path):
    (tmp_path / "a").write_bytes(picture()[:-30])
    assert read_header(tmp_path / "a") == ((HEIGHT, WIDTH), 1)


def test_parts_of_coco_have_folders_of_their_own(tmp_path):
    root = write_coco(tmp_path, [GOOD_BOX])
    (root / "pictures").rename(root / "held")
    write_coco(root, [GOOD_BOX])
    parts = {"val_annotations": "all.json", "val_images": "held", "test_annotations": "all.json"}
    dataset = coco(root, **parts)
    held_out, test = dataset.validation(), dataset.test()
    assert held_out is not None
    assert test is not None
    folders = [Path(part.describe(0)).parent.name for part in (dataset, held_out, test)]
    assert folders == ["pictures", "held", "pictures"]


def test_other_boxes_are_other_data(tmp_path):
    one, other = (coco(write_coco(tmp_path, [box])) for box in (GOOD_BOX, GOOD_BOX | {"bbox": [1, 2, 3, 5]}))
    assert one.encoded(0) != other.encoded(0)
    assert one.encoded(1) == other.encoded(1)


def test_dark_images_with_boxes_are_warned_of(tmp_path, caplog):
    root = write_coco(tmp_path, [GOOD_BOX])
    for name in ("7.png", "9.png"):
        Image.fromarray(np.full((HEIGHT, WIDTH), 4000, dtype=np.uint16)).save(root / "pictures" / name)
    coco(root)
    assert "set dataset.max_value=4095" in caplog.text
