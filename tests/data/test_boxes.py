"""Pictures with boxes: reading Pascal VOC and COCO, invalid boxes, and augmentation of boxes and pixels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from coco_folder import coco, write_coco
from voc_folder import HEIGHT, WIDTH, picture, voc, write_voc, xml

from jepa.config import Composer
from jepa.data.box_transforms import NO_BOX, BoxAugment, Letterbox, draw_crop
from jepa.data.loader import batches, downscale, downscale_boxes
from jepa.types import Field, RawBatch

GREY = (0.5, 0.5, 0.5)
COMPOSER = Composer()


GOOD = {
    "a": xml(("dog", 5, 6, 25, 30), ("ant", 1, 2, 3, 4)),
    "b": xml(),
    "c": xml(("ant", 0, 0, 60, 40)),
}
SPLITS = {"train": ["a", "b"], "val": ["c"]}


# files


def test_voc_gives_boxes_in_pixels_and_classes_in_alphabetical_order(tmp_path):
    dataset = voc(write_voc(tmp_path, GOOD, SPLITS))
    assert dataset.fields == {"boxes": Field(shape=(5,), ragged=True)}
    assert dataset.classes == ("ant", "dog")
    assert dataset[0].fields["boxes"].tolist() == [[5, 6, 25, 30, 1], [1, 2, 3, 4, 0]]
    assert dataset[1].fields["boxes"].shape == (0, 5)
    clip, label, _ = dataset[0]
    assert (clip.shape, label) == ((3, 1, HEIGHT, WIDTH), -1)
    held_out = dataset.validation()
    assert held_out is not None
    assert held_out[0].fields["boxes"].tolist() == [[0, 0, 60, 40, 0]]
    assert dataset.test() is None


def test_without_a_split_all_annotated_images_are_taken(tmp_path):
    dataset = voc(write_voc(tmp_path, GOOD, {}), split=None, val_split=None)
    assert [Path(dataset.describe(index)).stem for index in range(len(dataset))] == ["a", "b", "c"]
    assert dataset.validation() is None


def test_coco_turns_corner_and_size_into_edges_and_numbers_classes_by_id(tmp_path):
    boxes = [
        {"id": 1, "image_id": 9, "category_id": 5, "bbox": [10, 20, 30, 15]},
        {"id": 2, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 1},
    ]
    dataset = coco(write_coco(tmp_path, boxes))
    assert dataset.classes == ("cat", "owl")
    assert [dataset[index].fields["boxes"].tolist() for index in range(2)] == [[], [[10, 20, 40, 35, 1]]]


def test_images_without_boxes_are_left_out_unless_keep_empty(tmp_path):
    dataset = voc(write_voc(tmp_path, GOOD, SPLITS), keep_empty=False)
    assert len(dataset) == 1
    with pytest.raises(ValueError, match=r"no image with boxes is left \(dataset\.keep_empty=false\)"):
        voc(write_voc(tmp_path, GOOD, {"train": ["b"]}), keep_empty=False, val_split=None)


def test_invalid_boxes_are_dropped_or_clipped_and_counted_once(tmp_path, caplog):
    bad = xml(
        ("ant", 5, 5, 5, 9),  # no width
        ("ant", 9, 5, 4, 9),  # swapped corners
        ("ant", "nan", 5, 9, 9),
        ("ant", 60, 0, 70, 9),  # touches the image from outside
        ("ant", -4, -4, -1, 9),
        ("ant", -3, 2, 99, 50),
        ("ant", 1, 1, 2, 2),
    )
    dataset = voc(write_voc(tmp_path, GOOD | {"b": bad}, SPLITS))
    assert dataset[1].fields["boxes"].tolist() == [[0, 2, 60, 40, 0], [1, 1, 2, 2, 0]]
    (record,) = caplog.records
    first = f"(the first: {tmp_path / 'Annotations' / 'b.xml'})"
    assert f"; 2 boxes without area left out {first}; 2 boxes outside of the image left out {first};" in record.message
    assert f"; 1 boxes clipped at the image's edge {first}" in record.message
    assert f"1 objects without numbers as xmin, ymin, xmax, ymax in bndbox left out {first}" in record.message


def test_difficult_objects_are_left_out_unless_difficult(tmp_path):
    root = write_voc(tmp_path, {"a": xml(("ant", 1, 1, 9, 9), extra="<difficult>1</difficult>")}, {"train": ["a"]})
    assert len(voc(root, val_split=None, classes=["ant"])[0].fields["boxes"]) == 0
    assert len(voc(root, val_split=None, difficult=True)[0].fields["boxes"]) == 1


def test_configured_classes_are_the_only_ones_and_keep_their_order(tmp_path, caplog):
    dataset = voc(write_voc(tmp_path, GOOD, SPLITS), classes=["dog", "cow"])
    assert dataset[0].fields["boxes"].tolist() == [[5, 6, 25, 30, 0]]
    assert "1 boxes of classes that are not in dataset.classes left out" in caplog.text


def test_a_class_that_only_the_held_out_part_has_is_refused_with_the_file(tmp_path):
    root = write_voc(tmp_path, GOOD | {"c": xml(("yak", 1, 1, 9, 9))}, SPLITS)
    with pytest.raises(ValueError, match=r"c\.xml: has the class yak.*dataset\.classes=\[ant,dog,yak\]"):
        voc(root)


def test_the_size_of_an_image_is_read_if_the_annotation_has_none(tmp_path):
    root = write_voc(tmp_path, {"a": xml(("ant", 1, 1, 99, 99), size=None)}, {"train": ["a"]})
    assert voc(root, val_split=None)[0].fields["boxes"].tolist() == [[1, 1, WIDTH, HEIGHT, 0]]


def test_an_image_that_is_replaced_after_its_header_was_read_is_unreadable(tmp_path):
    dataset = voc(write_voc(tmp_path, GOOD, SPLITS))
    (tmp_path / "JPEGImages" / "a.png").write_bytes(picture(WIDTH, HEIGHT))
    with pytest.raises(OSError, match="has 40x60 pixels, before it had 60x40"):
        dataset[0]


BROKEN = {
    "cut short": ("<annotation><object>", r"a\.xml: is not readable as XML"),
    "an entity": ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', r"a\.xml: has a document type"),
    "another encoding": ('<?xml version="1.0" encoding="nope"?><annotation/>', r"a\.xml: is not readable as XML"),
}


@pytest.mark.parametrize(("text", "expected"), BROKEN.values(), ids=BROKEN)
def test_the_error_for_broken_xml_has_the_file(tmp_path, text, expected):
    with pytest.raises(ValueError, match=expected):
        voc(write_voc(tmp_path, {"a": text}, {"train": ["a"]}), val_split=None)


def test_the_error_for_missing_files_of_voc_has_their_names(tmp_path):
    root = write_voc(tmp_path, GOOD, SPLITS | {"more": ["zebra"]})
    with pytest.raises(ValueError, match=r"no split tset.*tset\.txt.*train\.txt"):
        voc(root, split="tset")
    with pytest.raises(ValueError, match=r"zebra is in the split more, but there is no .*zebra\.xml"):
        voc(root, split="more")


BAD_JSON = {
    "cut short": ('{"images": [', r"all\.json cannot be read \(Expecting value"),
    "a list": ("[]", r"all\.json holds no mapping"),
    "no images": ('{"categories": []}', r"all\.json: has no list of images"),
    "no id": ('{"categories": [{"name": "x"}]}', r"all\.json: entry 0 of categories has no id"),
}


@pytest.mark.parametrize(("text", "expected"), BAD_JSON.values(), ids=BAD_JSON)
def test_the_error_for_broken_json_has_the_file(tmp_path, text, expected):
    root = write_coco(tmp_path, [])
    (root / "all.json").write_text(text)
    with pytest.raises(ValueError, match=expected):
        coco(root)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["dataset=voc", "dataset.root_path=nowhere"], "nowhere/Annotations"),
        (["dataset=voc", "dataset.split=trian"], "dataset.split=trian: there is no"),
        (["dataset=voc", "augment.views=2"], "augment.views=2: objective=detect takes one crop"),
        (["dataset=voc", "image_size=240"], "240 is not divisible by 32; nearest: 224, 256"),
        (["dataset=voc", "augment.local_views=2"], "use augment.local_views=0"),
        (["dataset=voc", "image_size=[256,240]"], "240 is not divisible by 32; nearest: 224, 256"),
        (["dataset=voc", "objective.head=fcos", "objective.width=66"], "objective.head=fcos takes a multiple of 32"),
        (["dataset=voc", "dataset.exif=upright"], "dataset.exif=upright"),
        (["dataset=voc", "objective.head=yolo"], "objective.head=yolo: no such head"),
        (["dataset=voc", "objective.nms_threshold=2"], "objective.nms_threshold=2: must be from 0 to 1"),
        (["dataset=voc", "objective.smallest_anchor=2"], "objective.smallest_anchor=2: must be above 0"),
        (["dataset=voc", "evaluator=[knn,detection]"], "objective=detect gives knn nothing to look at"),
        (["dataset=voc", "mask=random"], "objective=detect uses no mask"),
        (["dataset=shapes"], "Detector learns from boxes, and Shapes has none; choose dataset=coco or voc"),
        (["dataset=coco"], "dataset.root_path=./data (dataset/coco.yaml) with dataset.annotations"),
    ],
)
def test_invalid_configurations_are_refused_before_torch_is_imported(tmp_path, monkeypatch, overrides, expected):
    write_voc(tmp_path / "data", GOOD, SPLITS)
    monkeypatch.chdir(tmp_path)
    faults = COMPOSER.check(["objective=detect", *overrides]).errors
    assert any(expected in fault for fault in faults), faults


@pytest.mark.parametrize("width", [32, 96])
def test_fcos_takes_every_multiple_of_its_groups(width, tmp_path, monkeypatch):
    write_voc(tmp_path / "data", GOOD, SPLITS)
    monkeypatch.chdir(tmp_path)
    assert not COMPOSER.check(
        ["objective=detect", "dataset=voc", "objective.head=fcos", f"objective.width={width}", "augment.views=1"]
    ).errors


def test_only_a_detector_is_evaluated_with_boxes(tmp_path, monkeypatch):
    write_voc(tmp_path / "data", GOOD, SPLITS)
    monkeypatch.chdir(tmp_path)
    inspected = [COMPOSER.check([f"objective={name}", "dataset=voc"]) for name in ("detect", "jepa")]
    assert [result.errors for result in inspected] == [[], []]
    assert [*inspected[0].config["evaluator"]] == ["detection"]
    assert {"knn", "diagnostics"} <= set(inspected[1].config["evaluator"]) - {"detection"}


# batches


def test_batches_hold_the_boxes_of_their_samples(tmp_path):
    dataset = voc(write_voc(tmp_path, GOOD, SPLITS))
    raw = next(batches(dataset, batch_size=2, seed=0, num_workers=0, fields=dataset.fields))
    assert raw.fields["boxes"].shape == (2, 2, 5)
    full = raw.fields["boxes"][raw.fields["boxes"][:, :, 4].amax(dim=1) >= 0]
    assert full.tolist() == [dataset[0].fields["boxes"].tolist()]
    assert (raw.fields["boxes"] == NO_BOX).all(dim=2).sum() == 2
    half = next(batches(dataset, batch_size=2, seed=0, num_workers=0, fields=dataset.fields, short_side=HEIGHT // 2))
    assert half.sizes.tolist() == [[HEIGHT // 2, WIDTH // 2]] * 2
    is_box = raw.fields["boxes"][:, :, 4] >= 0
    assert torch.equal(half.fields["boxes"][is_box][:, :4], raw.fields["boxes"][is_box][:, :4] / 2)
    assert torch.equal(half.fields["boxes"][..., 4], raw.fields["boxes"][..., 4])


@pytest.mark.parametrize("size", [(40, 60), (20, 300)])
def test_boxes_follow_pictures_that_are_downscaled_or_cut(size):
    clip = torch.zeros(1, 1, *size, dtype=torch.uint8)
    left = size[1] // 2 - 8
    clip[..., 8:16, left : left + 16] = 255
    small = downscale(clip, 10)
    (box,) = downscale_boxes(torch.tensor([[left, 8, left + 16, 16, 0.0]]), size, 10)
    assert extent(small[0, 0] > 127) == pytest.approx(box[:4].tolist(), abs=1)
    assert torch.equal(downscale_boxes(torch.ones(2, 5), size, 100), torch.ones(2, 5))


# augmentation


def extent(is_inside: torch.Tensor) -> list[int]:
    """bool [H, W] -> left, top, right, bottom"""
    rows, columns = (is_inside.any(dim=dim).nonzero().flatten() for dim in (1, 0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def augment(**changes) -> BoxAugment:
    values = {"image_size": (48, 64), "crop_scale": (0.3, 1.0), "crop_aspect": (0.7, 1.4), "flip": True}
    return BoxAugment(**(values | {"mean": GREY, "std": (1.0, 1.0, 1.0)} | changes))


def raw_batch(count: int, sizes: tuple[int, int] = (90, 120)) -> RawBatch:
    """Black pictures with a white rectangle each, its box, and a row of padding."""
    pixels = torch.zeros(count, 3, 1, *sizes, dtype=torch.uint8)
    boxes = torch.full((count, 2, 5), NO_BOX)
    for number in range(count):
        left, top = 10 + 7 * number % 60, 5 + 11 * number % 50
        pixels[number, :, :, top : top + 30, left : left + 40] = 255
        boxes[number, 0] = torch.tensor([left, top, left + 40, top + 30, number % 3])
    zeros = torch.zeros(count, dtype=torch.long)
    return RawBatch(pixels, torch.tensor([sizes] * count), {"labels": zeros - 1, "boxes": boxes}, zeros[:0], zeros)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_boxes_are_moved_exactly_as_their_pixels():
    raw = raw_batch(24)
    batch = augment()(raw, seeded())
    widths = set()
    for clip, (box, padding) in zip(batch.clips, batch.fields["boxes"], strict=True):
        is_white = clip[0, 0] > 0
        assert padding[4] == NO_BOX
        if box[4] == NO_BOX:
            assert is_white.sum() <= 2 * 64
            continue
        assert extent(is_white) == pytest.approx(box[:4].tolist(), abs=1)
        widths.add(round(float(box[2] - box[0])))
    assert len(widths) > 5
    assert torch.equal(batch.fields["boxes"][0, :, 4], raw.fields["boxes"][0, :, 4])


@pytest.mark.parametrize("sizes", [(90, 120), (40, 200), (200, 40)])
def test_boxes_lie_inside_of_the_picture_and_never_in_its_margin(sizes):
    raw = raw_batch(16, (200, 200))._replace(sizes=torch.tensor([sizes] * 16))
    raw.pixels[:] = 200
    raw.fields["boxes"][:, 0, :4] = torch.tensor([0.0, 0.0, sizes[1], sizes[0]])
    batch = augment(crop_scale=(1.0, 1.0))(raw, seeded())
    for clip, (box, _) in zip(batch.clips, batch.fields["boxes"], strict=True):
        assert extent(clip[0, 0] != 0) == pytest.approx(box[:4].tolist())


def test_flipping_twice_gives_the_picture_itself():
    raw, whole = raw_batch(1), augment(crop_scale=(1.0, 1.0), crop_aspect=(1.0, 1.0), image_size=(90, 120))
    clip, boxes = raw.pixels[0].float(), raw.fields["boxes"][0]
    flip = whole.crop_box((90, 120), [0.0, 0.0, 0.0, 0.0, 0.0])
    assert flip.is_flipped
    once, twice = torch.zeros_like(clip), torch.zeros_like(clip)
    moved = draw_crop(once, raw.pixels[0], boxes, flip)
    assert not torch.equal(moved[0], boxes[0])
    back = draw_crop(twice, once.to(torch.uint8), moved, flip)
    assert torch.equal(twice, clip)
    assert torch.equal(back[0], boxes[0])


def test_a_sample_depends_neither_on_the_batch_nor_on_its_ranks():
    raw, change = raw_batch(4), augment(jitter=1.0)
    whole = change(raw, seeded())
    first_rows = raw.map(lambda tensor: tensor[:2])
    part = change(first_rows, seeded())
    assert torch.equal(part.clips, whole.clips[:2])
    assert torch.equal(part.fields["boxes"], whole.fields["boxes"][:2])
    odd_rows = raw.map(lambda tensor: tensor[1::2])
    odd = change(odd_rows, seeded(), lambda numbers: numbers[1::2], 2)
    assert torch.equal(odd.clips, whole.clips[1::2])
    assert torch.equal(odd.fields["boxes"], whole.fields["boxes"][1::2])
    assert not torch.equal(change(raw, seeded(1)).fields["boxes"], whole.fields["boxes"])


def test_boxes_outside_of_the_crop_get_no_class():
    raw = raw_batch(32)
    raw.fields["boxes"][:, 0, :4] = torch.tensor([0.0, 0.0, 12.0, 9.0])  # in a corner
    batch = augment(crop_scale=(0.3, 0.3))(raw, seeded())
    is_box = batch.fields["boxes"][:, 0, 4] >= 0
    assert 0 < is_box.sum() < 32
    sides = batch.fields["boxes"][:, 0, 2:4] - batch.fields["boxes"][:, 0, :2]
    assert (sides[is_box] >= 1).all()


def test_a_letterbox_keeps_the_aspect_ratio_and_restores_boxes():
    raw, whole = raw_batch(3), Letterbox(image_size=(48, 64), mean=GREY, std=(1.0, 1.0, 1.0))
    pictures = [raw.pixels[0], raw.pixels[1][..., :60], raw.pixels[2][..., :50, :]]
    clips = whole(pictures)
    assert clips.shape == (3, 3, 1, 48, 64)
    for clip, pixels, box in zip(clips, pictures, raw.fields["boxes"][:, 0], strict=True):
        in_clip = torch.tensor([extent(clip[0, 0] > 0)], dtype=torch.float)
        sides = (in_clip[0, 2:] - in_clip[0, :2]).tolist()
        expected = box[:4].clone()
        expected[2::2].clamp_(max=pixels.shape[-1])
        expected[3::2].clamp_(max=pixels.shape[-2])
        assert whole.restore(in_clip, pixels.shape[-2:])[0].tolist() == pytest.approx(expected.tolist(), abs=3)
        assert sides[0] > sides[1] or pixels is not pictures[0]
    outside = whole.restore(torch.tensor([[-5.0, -5.0, 99.0, 99.0]]), (90, 60))
    assert outside.tolist() == [[0, 0, 60, 90]]
