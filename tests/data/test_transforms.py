"""Crops, resampling and normalisation of batches."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from jepa.data.transforms import BOX_DRAWS, CHUNK, Augment, EvalTransform, draw_boxes, resample_densely, resample_singly
from jepa.types import RawBatch

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def smooth(*shape: int, seed: int = 0) -> torch.Tensor:
    """uint8 noise [..., H, W] without the highest frequencies"""
    noise = torch.rand(
        *shape[:-2], shape[-2] // 2 + 1, shape[-1] // 2 + 1, generator=torch.Generator().manual_seed(seed)
    )
    noise = interpolate(noise.flatten(0, -3)[None], shape[-2:], mode="bilinear")[0]
    return (noise * 255).to(torch.uint8).reshape(shape)


def raw_batch(sizes: list[tuple[int, int]], frames: int = 1) -> RawBatch:
    height, width = (max(side) for side in zip(*sizes, strict=True))
    pixels = torch.zeros(len(sizes), 3, frames, height, width, dtype=torch.uint8)
    for index, (h, w) in enumerate(sizes):
        pixels[index, ..., :h, :w] = smooth(3, frames, h, w, seed=index)
    labels, broken = torch.full((len(sizes),), -1), torch.empty(0, dtype=torch.long)
    return RawBatch(pixels, torch.tensor(sizes), {"labels": labels}, broken, torch.zeros_like(labels))


def augment(**changes) -> Augment:
    defaults = {"image_size": (24, 32), "crop_scale": (0.3, 1.0), "crop_aspect": (0.75, 4 / 3), "flip": True}
    return Augment(**defaults | {"mean": MEAN, "std": STD} | changes)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_boxes(sizes: torch.Tensor, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes and flips of `augment(**changes)` with the first generator."""
    transform = augment(**changes)
    uniform = torch.rand(len(sizes), BOX_DRAWS, generator=seeded())
    return draw_boxes(sizes, uniform, transform.crop_scale, transform.crop_aspect)


def boxes_of(sizes: list[tuple[int, int]], **changes) -> torch.Tensor:
    return random_boxes(torch.tensor(sizes), **changes)[0]


SIZES = [(37, 50), (50, 37), (64, 64), (1, 1), (10, 100), (5, 3), (33, 48), (90, 20)]


def test_boxes_lie_within_their_images():
    boxes = boxes_of(SIZES * 100)
    sizes = torch.tensor(SIZES * 100)
    assert boxes.dtype == torch.long
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= sizes).all()


def test_boxes_follow_scale_and_aspect_independently():
    top, left, height, width = (
        boxes_of([(400, 400)] * 4000, crop_scale=(0.2, 0.5), crop_aspect=(0.8, 1.25)).double().unbind(1)
    )
    share, aspect = height * width / 160000, (width / height).log()
    assert 0.198 < share.min() < 0.202
    assert 0.498 < share.max() < 0.502
    assert share.mean() == pytest.approx(0.35, abs=0.01)
    assert aspect.abs().max() < math.log(1.26)
    assert aspect.mean().abs() < 0.01
    assert torch.corrcoef(torch.stack([share, aspect, top + height / 2, left + width / 2])).triu(1).abs().max() < 0.06


def test_positions_are_uniform_and_reach_every_edge():
    top, left, height, width = boxes_of([(20, 30)] * 4000, crop_scale=(0.5, 0.9)).unbind(1)
    for start, length, size in ((top, height, 20), (left, width, 30)):
        assert (start == 0).any()
        assert (start + length == size).any()
        free = size - length > 0
        assert (start / (size - length).clamp(min=1))[free].mean() == pytest.approx(0.5, abs=0.03)


def test_if_no_box_fits_the_largest_central_one_is_used():
    boxes = boxes_of([(10, 1000), (1000, 10)], crop_scale=(0.9, 1.0), crop_aspect=(0.5, 2.0))
    assert boxes.tolist() == [[0, 490, 10, 20], [490, 0, 20, 10]]


def test_every_image_has_its_own_box():
    assert len(set(map(tuple, boxes_of([(200, 200)] * 64).tolist()))) > 60


def test_a_sample_does_not_depend_on_the_batch_size():
    raw = raw_batch([(40, 60), (60, 40), (50, 50), (31, 44), (60, 60)])
    whole = augment()(raw, seeded()).clips
    part = augment()(raw.map(lambda tensor: tensor[:2]), seeded()).clips
    assert torch.equal(whole[:2], part)


def test_the_generator_decides_everything():
    raw = raw_batch([(40, 60)] * 3)
    assert torch.equal(augment()(raw, seeded(1)).clips, augment()(raw, seeded(1)).clips)
    assert not torch.equal(augment()(raw, seeded(1)).clips, augment()(raw, seeded(2)).clips)


def test_half_of_the_images_are_flipped_unless_flip_is_false():
    raw = raw_batch([(24, 32)] * 400)
    raw = raw._replace(pixels=raw.pixels[:1].expand(400, -1, -1, -1, -1))
    whole = {"crop_scale": (1.0, 1.0), "crop_aspect": (4 / 3, 4 / 3)}
    plain = augment(**whole, flip=False)(raw, seeded()).clips
    mixed = augment(**whole)(raw, seeded()).clips
    assert (plain == plain[:1]).all()
    flipped = (mixed == plain.flip(-1)).flatten(1).all(1)
    assert (flipped | (mixed == plain).flatten(1).all(1)).all()
    assert 160 < flipped.sum() < 240


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("size", [(24, 32), (80, 64)])
def test_views_are_independent_crops_of_one_sample_side_by_side(size, frames):
    raw = raw_batch([(37, 40), size], frames)
    views = augment(views=3)(raw, seeded()).clips
    repeated = raw.map(lambda tensor: tensor.repeat_interleave(3, dim=0))
    assert views.shape == (6, 3, frames, 24, 32)
    torch.testing.assert_close(views, augment()(repeated, seeded()).clips, atol=1e-5, rtol=0)
    assert len({view.numpy().tobytes() for view in views}) == 6


def test_every_field_is_repeated_for_each_view():
    raw = raw_batch([(37, 40), (31, 44)])
    raw.fields["actions"] = torch.arange(8.0).view(2, 2, 2)
    batch = augment(views=3)(raw, seeded())
    assert batch.fields.keys() == {"labels", "actions"}
    assert torch.equal(batch.fields["actions"], raw.fields["actions"][[0, 0, 0, 1, 1, 1]])


def test_one_view_is_the_batch_itself():
    raw = raw_batch([(37, 50), (31, 44)])
    assert torch.equal(augment(views=1)(raw, seeded()).clips, augment()(raw, seeded()).clips)


def test_views_of_a_sample_do_not_depend_on_the_batch_size():
    raw = raw_batch([(40, 60), (60, 40), (50, 50)])
    part = raw.map(lambda tensor: tensor[:2])
    assert torch.equal(augment(views=2)(raw, seeded()).clips[:4], augment(views=2)(part, seeded()).clips)


@pytest.mark.parametrize("size", [(24, 32), (80, 64)])
def test_all_frames_of_a_clip_share_one_box(size):
    """A repeated image gives a constant clip, and a frame does not depend on its neighbours."""
    raw = raw_batch([size, (37, 50)], frames=3)
    clips = augment()(raw, seeded()).clips
    for frame in range(3):
        still = raw._replace(pixels=raw.pixels[:, :, frame : frame + 1].expand(-1, -1, 3, -1, -1))
        torch.testing.assert_close(augment()(still, seeded()).clips[:, :, 0], clips[:, :, frame], atol=1e-5, rtol=0)


def test_normalisation_is_that_of_the_data_set():
    raw = raw_batch([(24, 32)])
    clips = augment(crop_scale=(1.0, 1.0), crop_aspect=(4 / 3, 4 / 3), flip=False)(raw, seeded()).clips
    mean, std = (torch.tensor(values).view(1, 3, 1, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(clips, (raw.pixels / 255 - mean) / std, atol=1e-5, rtol=0)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("size", [(24, 32), (96, 64), (7, 5)])
def test_the_two_routes_agree_to_one_grey_level(size, frames):
    raw = raw_batch([(37, 50), (64, 41), (64, 64), (9, 9)], frames)
    boxes, flips = random_boxes(raw.sizes)
    singly = resample_singly(raw.pixels, boxes, size, flips, None)
    densely = resample_densely(raw.pixels, boxes, size, flips, None)
    assert singly.shape == (4, 3, frames, *size)
    assert (singly - densely).abs().max() <= 1.01


def test_the_dense_route_equals_float_resampling_of_each_crop():
    raw = raw_batch([(37, 50), (64, 41), (64, 64)])
    boxes, _ = random_boxes(raw.sizes)
    densely = resample_densely(raw.pixels, boxes, (24, 32), None, None)
    for clip, frame, (top, left, height, width) in zip(
        densely, raw.pixels[:, :, 0].float(), boxes.tolist(), strict=True
    ):
        crop = frame[None, :, top : top + height, left : left + width]
        torch.testing.assert_close(
            clip[:, 0], interpolate(crop, (24, 32), mode="bilinear", antialias=True)[0], atol=1e-3, rtol=0
        )


def test_the_dense_route_in_pieces_is_the_same(monkeypatch):
    raw = raw_batch([(37, 50), (64, 41), (64, 64)])
    boxes, flips = random_boxes(raw.sizes)
    whole = resample_densely(raw.pixels, boxes, (24, 32), flips, None)
    monkeypatch.setitem(CHUNK, "cpu", 2 * raw.pixels[0].numel())
    torch.testing.assert_close(resample_densely(raw.pixels, boxes, (24, 32), flips, None), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("route", [resample_singly, resample_densely])
def test_pixels_outside_the_box_have_no_influence(route):
    raw = raw_batch([(64, 64)])
    boxes = torch.tensor([[10, 12, 30, 40]])
    cropped = route(raw.pixels, boxes, (24, 32), None, None)
    other = torch.full_like(raw.pixels, 255)
    other[..., 10:40, 12:52] = raw.pixels[..., 10:40, 12:52]
    assert torch.equal(route(other, boxes, (24, 32), None, None), cropped)


def test_at_the_short_side_no_crop_is_enlarged():
    side = augment(image_size=(224, 224), crop_scale=(0.3, 1.0)).short_side
    assert side == 409
    assert boxes_of([(side, side)] * 2000, crop_aspect=(1.0, 1.0))[:, 2:].min() >= 224


def test_small_images_take_the_dense_route_and_clips_and_large_images_the_other(monkeypatch):
    routes = []
    for name in ("resample_singly", "resample_densely"):
        monkeypatch.setattr(f"jepa.data.transforms.{name}", lambda pixels, *_, name=name: routes.append(name) or pixels)
    for size, frames in (((32, 32), 1), ((200, 300), 1), ((32, 32), 2)):
        augment()(raw_batch([size], frames), seeded())
    assert routes == ["resample_densely", "resample_singly", "resample_singly"]


def test_evaluation_does_not_change_an_image_of_the_right_size():
    images = smooth(2, 3, 24, 32)
    transform = EvalTransform(image_size=(24, 32), mean=MEAN, std=STD)
    assert torch.equal(transform.pictures(images)[:, :, 0], images)


def test_evaluation_crops_the_centre_with_the_right_aspect_ratio():
    image = torch.zeros(3, 60, 200, dtype=torch.uint8)
    image[..., 70:130] = smooth(3, 60, 60)
    transform = EvalTransform(image_size=(60, 60), mean=MEAN, std=STD)
    assert torch.equal(transform.pictures(image)[0, :, 0], image[..., 70:130])
    halved = EvalTransform(image_size=(30, 30), mean=MEAN, std=STD).pictures(image)[0, :, 0]
    reference = interpolate(image[None, ..., 70:130].float(), (30, 30), mode="bilinear", antialias=True)[0]
    assert (halved.float() - reference).abs().max() <= 1


def test_evaluation_takes_batches_clips_and_lists_alike():
    images = smooth(2, 3, 40, 50)
    transform = EvalTransform(image_size=(24, 32), mean=MEAN, std=STD)
    expected = transform(images)
    assert expected.shape == (2, 3, 1, 24, 32)
    assert torch.equal(transform(images.unsqueeze(2)), expected)
    assert torch.equal(transform(list(images)), expected)
    assert torch.equal(transform([image.unsqueeze(1) for image in images]), expected)
    assert torch.equal(transform(images[0]), expected[:1])
    assert transform([smooth(3, 9, 90), smooth(3, 33, 21)]).shape == (2, 3, 1, 24, 32)


def test_evaluation_treats_every_frame_of_a_clip_as_an_image():
    clips = smooth(2, 3, 4, 40, 50)
    transform = EvalTransform(image_size=(24, 32), mean=MEAN, std=STD)
    expected = torch.stack([transform(clips[:, :, frame])[:, :, 0] for frame in range(4)], dim=2)
    assert torch.equal(transform(clips), expected)
    assert torch.equal(transform(list(clips)), expected)
    assert transform([smooth(3, 4, 60, 90), smooth(3, 4, 33, 21)]).shape == (2, 3, 4, 24, 32)


def test_evaluation_is_its_pictures_normalised():
    images = smooth(2, 3, 40, 50)
    transform = EvalTransform(image_size=(24, 32), mean=MEAN, std=STD)
    pictures = transform.pictures(images)
    assert pictures.dtype == torch.uint8
    mean, std = (torch.tensor(values).view(1, 3, 1, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(transform(images), (pictures / 255 - mean) / std, atol=1e-5, rtol=0)


def test_evaluation_and_an_augmentation_that_does_nothing_agree():
    raw = raw_batch([(48, 64)] * 2)
    still = augment(crop_scale=(1.0, 1.0), crop_aspect=(4 / 3, 4 / 3), flip=False)(raw, seeded()).clips
    evaluated = EvalTransform(image_size=(24, 32), mean=MEAN, std=STD)(raw.pixels)
    assert (still - evaluated).abs().max() <= 1.01 / (255 * min(STD))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 8, 8), "expected uint8"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "1 channels; expected 3"),
        (torch.zeros(8, 8, dtype=torch.uint8), r"\(8, 8\)"),
        ([], "empty list"),
    ],
)
def test_evaluation_refuses_invalid_images(images, message):
    with pytest.raises(ValueError, match=message):
        EvalTransform(image_size=(8, 8), mean=MEAN, std=STD)(images)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": (0, 8)},
        {"local_views": 2},
        {"std": (0.1, 0.0, 0.1)},
        {"mean": (0.5,)},
    ],
)
def test_invalid_augmentations_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        augment(**changes)


def test_images_of_pillow_arrays_and_paths_are_transformed_as_tensors(tmp_path):
    picture = smooth(3, 40, 50)
    array = picture.permute(1, 2, 0).numpy()
    path = tmp_path / "picture.png"
    Image.fromarray(array).save(path)
    transform = EvalTransform(image_size=(24, 32), mean=MEAN, std=STD)
    expected = transform(picture)
    for source in (array, Image.fromarray(array), path, str(path), [path], (array,), array[None]):
        assert torch.equal(transform(source), expected)
    small = smooth(3, 30, 20)
    mixed = [path, small, Image.fromarray(array), array]
    assert torch.equal(transform(mixed), torch.cat([expected, transform(small), expected, expected]))
    assert torch.equal(transform(np.stack([array] * 2)), torch.cat([expected] * 2))


def test_grey_images_of_pillow_and_their_colours_are_converted():
    grey = EvalTransform(image_size=(24, 32), mean=(0.5,), std=(0.5,))
    image = Image.fromarray(smooth(3, 40, 50).permute(1, 2, 0).numpy())
    assert torch.equal(grey(image), grey(torch.from_numpy(np.array(image.convert("L")))[None]))
    colour = EvalTransform(image_size=(24, 32), mean=MEAN, std=STD)
    assert torch.equal(colour(image.convert("L")), colour(image.convert("L").convert("RGB")))


def test_an_image_of_pillow_is_turned_by_its_orientation():
    image = Image.fromarray(smooth(3, 40, 50).permute(1, 2, 0).numpy())
    image.getexif()[0x0112] = 6
    upright = EvalTransform(image_size=(50, 40), mean=MEAN, std=STD)
    assert torch.equal(upright(image), upright(image.rotate(-90, expand=True)))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("nowhere.png", OSError, "nowhere.png: No such file"),
        (["nowhere.png"], OSError, "nowhere.png: No such file"),
        (Image.new("I;16", (9, 9)), ValueError, "mode I;16; scale it to 8 bits"),
        (np.zeros((9, 9), np.uint8), ValueError, r"shape \(9, 9\); expected \[H, W, 3\]"),
        (np.zeros((9, 9, 4), np.uint8), ValueError, r"expected \[H, W, 3\]"),
        (np.zeros((9, 9, 3)), ValueError, "expected uint8 pixels"),
        ([None], ValueError, "not NoneType"),
        (3, ValueError, "not int"),
    ],
)
def test_what_is_no_image_is_refused_by_its_name(source, error, message):
    with pytest.raises(error, match=message):
        EvalTransform(image_size=(8, 8), mean=MEAN, std=STD)(source)
