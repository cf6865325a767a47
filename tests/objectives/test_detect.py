"""A detector on a plain ViT: its pyramid, losses, detections, metrics and runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from checked import checked
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from toy_model import CPU
from voc_folder import voc, write_voc, xml

from jepa import JEPAAgent, JEPAConfig, load_encoder
from jepa.encoders.spatial import SpatialEncoder
from jepa.errors import ConfigError, RunError
from jepa.evaluation.box_snapshot import DetectionSnapshotter
from jepa.evaluation.detection import Detection, precisions
from jepa.evaluation.pictures import draw_boxes
from jepa.evaluation.types import BoxSnapshot, Detections
from jepa.layers.pyramid import STRIDES, SimpleFeaturePyramid
from jepa.objectives.detect import Detector
from jepa.optim import parameter_groups
from jepa.reports.run import final_table
from jepa.reports.verdict import selection_metric, verdict
from jepa.runs.checkpoint import find, load_model
from jepa.runs.metrics import read_rows
from jepa.types import Batch, Masks

CLASSES = ("ant", "bee", "cow")
SIDE, PATCH = 64, 8
NO_MASKS = Masks(torch.zeros(0), torch.zeros(0))


def detector(head: str = "faster_rcnn", *, patch: int = PATCH, side: int = SIDE, depth: int = 2, **changes) -> Detector:
    torch.manual_seed(0)
    encoder = SpatialEncoder(clip_shape=(3, 1, side, side), patch_size=patch, embed_dim=32, depth=depth, num_heads=2)
    values = {"width": 32, "regions": 32, "smallest_anchor": 0.125}
    return checked(Detector, encoder=encoder, classes=CLASSES, head=head, **(values | changes))


def sample(count: int = 2) -> Batch:
    """Noise with three boxes in each image and a last row of padding."""
    random = torch.Generator().manual_seed(1)
    corners = torch.randint(0, 30, (count, 4, 2), generator=random).float()
    boxes = torch.cat([corners, corners + 8 + torch.randint(0, 20, (count, 4, 2), generator=random)], dim=2)
    classes = torch.arange(4.0).sub(1).flip(0).expand(count, 4)  # 2, 1, 0, -1
    clips = torch.randn(count, 3, 1, SIDE, SIDE, generator=random)
    return Batch(clips, {"labels": torch.full((count,), -1), "boxes": torch.cat([boxes, classes[..., None]], dim=2)})


def with_boxes(batch: Batch, boxes: torch.Tensor) -> Batch:
    return batch._replace(fields=batch.fields | {"boxes": boxes})


def loss_of(model: Detector, batch: Batch) -> torch.Tensor:
    torch.manual_seed(3)  # a step is seeded too
    return model(batch, NO_MASKS).loss


# the pyramid


@pytest.mark.parametrize("grid", [(4, 6), (2, 2)])
def test_the_levels_have_strides_of_a_quarter_to_two_patches(grid):
    levels = SimpleFeaturePyramid(input_dim=12, width=6)(torch.randn(2, 12, *grid))
    assert [*levels] == ["0", "1", "2", "3"]
    for level, stride in zip(levels.values(), STRIDES, strict=True):
        assert level.shape == (2, 6, *(int(side / stride) for side in grid))


def test_a_level_sees_the_tokens_at_its_own_place():
    """A token changes its own cells and, by the 3x3 convolution, their neighbours, and nothing else."""
    pyramid, tokens = SimpleFeaturePyramid(input_dim=12, width=6), torch.randn(1, 12, 6, 6)
    other = tokens.clone()
    other[:, :, 2, 4] += 1
    for level, stride in zip(range(3), STRIDES, strict=False):
        changed = (pyramid.levels[level](tokens) != pyramid.levels[level](other)).any(dim=1)[0].nonzero()
        rows, columns = changed.min(dim=0).values, changed.max(dim=0).values
        assert rows.tolist() == [2 / stride - 1, 4 / stride - 1]
        assert columns.tolist() == [3 / stride, 5 / stride]


@pytest.mark.parametrize("patch", [8, 12, 14])
def test_proposals_are_pooled_at_their_position_also_if_the_patch_is_no_power_of_two(patch):
    model = detector(patch=patch, side=6 * patch, smallest_anchor=0.0625)
    levels = {}
    for number, stride in enumerate(STRIDES):
        x = torch.arange(6 / stride) * stride * patch  # torchvision takes the corner of a cell for its middle
        levels[str(number)] = x.expand(1, 1, len(x), -1)
    boxes = torch.tensor([[1.0, 1, 1.5, 2], [1, 1, 3, 3], [1, 1, 4, 4], [0, 0, 3.5, 4]]) * patch
    pool = model.detector.roi_heads.box_roi_pool
    assert len(set(pool.map_levels([boxes]).tolist())) == 3
    pooled = pool(levels, [boxes], [(6 * patch, 6 * patch)])
    torch.testing.assert_close(pooled.mean(dim=(1, 2, 3)), (boxes[:, 0] + boxes[:, 2]) / 2, atol=0.02 * patch, rtol=0)


def test_a_proposal_is_pooled_from_the_level_of_its_size():
    """Anchors of 1, 2, 4, 8 times the smallest belong to levels 0 to 3; a proposal goes there or one level finer."""
    sides = torch.tensor([0.5, 1, 2, 3.9, 4, 8, 16, 32]) * 0.125 * SIDE
    boxes = torch.stack([torch.zeros(8), torch.zeros(8), sides, sides], dim=1)
    pool = detector(smallest_anchor=0.125).detector.roi_heads.box_roi_pool
    assert pool.map_levels([boxes]).tolist() == [0, 0, 0, 0, 1, 2, 3, 3]


@pytest.mark.parametrize("head", ["faster_rcnn", "fcos"])
def test_the_limits_of_detections_reach_the_head(head):
    model = detector(head, score_threshold=0.3, nms_threshold=0.6, max_found=7, regions=48)
    inner = model.detector.roi_heads if head == "faster_rcnn" else model.detector
    assert (inner.score_thresh, inner.nms_thresh, inner.detections_per_img) == (0.3, 0.6, 7)
    assert head == "fcos" or inner.fg_bg_sampler.batch_size_per_image == 48


def test_detecting_keeps_no_gradients():
    assert not any(boxes.requires_grad for boxes in detector(score_threshold=0.0).eval().detect(sample().clips))


def test_an_encoder_whose_grid_has_no_pyramid_is_refused():
    with pytest.raises(ValueError, match=r"image side 40 is not divisible by the coarsest level's 16.*32 and 48"):
        detector(side=40)
    wide = SpatialEncoder(clip_shape=(3, 1, 32, 40), patch_size=8, embed_dim=8, depth=1, num_heads=1)
    with pytest.raises(ValueError, match="image side 40 is not divisible"):
        Detector(encoder=wide, classes=CLASSES)
    encoder = SpatialEncoder(clip_shape=(3, 1, 32, 32), patch_size=(8, 16), embed_dim=8, depth=1, num_heads=1)
    with pytest.raises(ValueError, match="square patches"):
        Detector(encoder=encoder, classes=CLASSES)
    with pytest.raises(ValueError, match="head=yolo"):
        detector("yolo")
    with pytest.raises(ValueError, match="no classes"):
        Detector(encoder=encoder, classes=())


# losses


@pytest.mark.parametrize("head", ["faster_rcnn", "fcos"])
def test_padding_rows_do_not_change_the_loss(head):
    model, batch = detector(head), sample()
    boxes = batch.fields["boxes"]
    padding = torch.tensor([60.0, 60, 2, 2, -1]).expand(2, 3, 5)
    more = with_boxes(batch, torch.cat([padding, boxes], dim=1))
    fewer = with_boxes(batch, boxes[:, :3])
    assert loss_of(model, batch) == loss_of(model, more) == loss_of(model, fewer)
    assert loss_of(model, batch) != loss_of(model, with_boxes(batch, boxes[:, :2]))


@pytest.mark.parametrize("head", ["faster_rcnn", "fcos"])
def test_the_loss_is_the_sum_of_its_terms_and_reaches_every_weight(head):
    model = detector(head)
    for batch in (sample(), with_boxes(sample(), torch.zeros(2, 0, 5))):  # without boxes: background
        output = model(batch, NO_MASKS)
        assert output.loss.dtype == torch.float32
        assert output.loss.item() == pytest.approx(sum(term.item() for term in output.metrics.values()))
        torch.testing.assert_close(output.embedding, model.encoder(batch.clips).mean(dim=1).detach())
        output.loss.backward()
    assert [name for name, weights in model.named_parameters() if weights.grad is None] == []


def test_a_frozen_encoder_stays_as_it_is_and_in_eval_mode():
    model = detector(freeze=True).train()
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
    assert all(parameter.requires_grad for parameter in detector().encoder.parameters())
    assert not model.encoder.training
    assert model.pyramid.training
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        loss_of(model, sample()).backward()
        optimizer.step()
    changed = {name for name, weights in model.state_dict().items() if not torch.equal(weights, before[name])}
    assert not [name for name in changed if name.startswith("encoder.")]
    assert {"pyramid.levels.0.1.weight", "detector.rpn.head.cls_logits.weight"} <= changed
    assert detector().train().encoder.training


def test_layer_decay_scales_the_learning_rate_by_depth():
    model = detector(layer_decay=0.5)
    groups = parameter_groups(model, model.lr_scales())
    scales = {id(weights): group["scale"] for group in groups for weights in group["params"]}
    by_name = {name: scales[id(weights)] for name, weights in model.named_parameters()}
    assert [by_name[f"encoder.blocks.{block}.mlp.fc1.weight"] for block in range(2)] == [1 / 4, 1 / 2]
    assert by_name["encoder.embed.weight"] == 1 / 8
    assert {scale for name, scale in by_name.items() if not name.startswith("encoder.")} == {1.0}
    with pytest.raises(ValueError, match="layer_decay=0"):
        detector(layer_decay=0.0)


def test_detections_equal_those_of_torchvisions_own_pipeline():
    """Two routes: ours, and a FasterRCNN with torchvision's own transform over a backbone that makes the same maps."""

    class Maps(nn.Module):
        out_channels = 32

        def forward(self, pictures):
            return dict(model.extract(pictures[:, :, None])[0].tensors)

    model, batch = detector(score_threshold=0.0).eval(), sample()
    heads = model.detector
    theirs = FasterRCNN(
        Maps(), rpn_anchor_generator=heads.rpn.anchor_generator, rpn_head=heads.rpn.head,
        box_roi_pool=heads.roi_heads.box_roi_pool, box_head=heads.roi_heads.box_head,
        box_predictor=heads.roi_heads.box_predictor, box_score_thresh=0.0,
    ).eval()  # fmt: skip
    theirs.transform = GeneralizedRCNNTransform(SIDE, SIDE, [0.0] * 3, [1.0] * 3, size_divisible=SIDE)
    with torch.no_grad():
        expected = theirs([*batch.clips[:, :, 0]])
    for ours, other in zip(model.detect(batch.clips), expected, strict=True):
        assert len(ours) > 10
        torch.testing.assert_close(ours[:, :4], other["boxes"])
        torch.testing.assert_close(ours[:, 5], other["scores"])
        assert torch.equal(ours[:, 4], other["labels"] - 1)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["faster_rcnn", "fcos"])
def test_it_learns_to_detect_a_box(head):
    """A bright rectangle on each picture, of one of two classes by its colour."""
    model = detector(head, side=32, depth=1, smallest_anchor=0.25).train()
    clips, boxes = torch.zeros(4, 3, 1, 32, 32), torch.zeros(4, 1, 5)
    for number, (left, top) in enumerate([(4, 4), (16, 6), (6, 18), (18, 16)]):
        clips[number, number % 2, :, top : top + 12, left : left + 10] = 3.0
        boxes[number, 0] = torch.tensor([left, top, left + 10, top + 12, number % 2])
    batch = Batch(clips, {"labels": torch.full((4,), -1), "boxes": boxes})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(18):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    detections = [Detections(*pair) for pair in zip(model.eval().detect(clips), boxes, strict=True)]
    assert precisions(detections, CLASSES, "detect/")["detect/map50"] > 90


# selection


def rows(*values: tuple) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float).reshape(len(values), -1 if values else 6)


NEAR, FAR, LOW = (0, 0, 100, 100), (200, 200, 300, 300), (400, 0, 500, 100)


def test_average_precision_of_a_hand_worked_case():
    """Class 0: found at the scores 0.9 right, 0.8 wrong, 0.7 right, of two that are annotated. Precision is 1 up to a
    recall of 0.5, that is at 51 of COCO's 101 points, and 2/3 at the 50 above. Class 1: one box, overlapped by 0.62:
    right at 0.5, 0.55 and 0.6, of ten overlaps. Class 2 is annotated nowhere."""
    pictures = [
        Detections(rows((*NEAR, 0, 0.9), (*LOW, 0, 0.8), (0, 0, 62, 100, 1, 0.5)), rows((*NEAR, 0), (*NEAR, 1))),
        Detections(rows((*FAR, 0, 0.7)), rows((*FAR, 0))),
        Detections(rows(), torch.zeros(0, 5)),
    ]
    first = 100 * (51 + 50 * 2 / 3) / 101
    assert precisions(pictures, ("red ant", "bee", "cow"), "detect/") == pytest.approx(
        {
            "detect/ap50_red_ant": first,
            "detect/ap50_bee": 100.0,
            "detect/map50": (first + 100) / 2,
            "detect/map75": first / 2,
            "detect/map": (first + 30) / 2,
        }
    )


def test_a_data_set_of_one_class_has_its_precision_too():
    detections = [Detections(rows((*NEAR, 0, 0.9)), rows((*NEAR, 0)))]
    assert precisions(detections, ("cell",), "detect/") == pytest.approx(
        {f"detect/{name}": 100.0 for name in ("map", "map50", "map75", "ap50_cell")}
    )


def test_detections_without_annotations_give_no_metric():
    assert precisions([Detections(rows((*NEAR, 0, 0.9)), torch.zeros(0, 5))], CLASSES, "detect/") == {}


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_part_without_boxes_has_no_precision_and_says_so(part, caplog):
    empty, full = (
        Detections(rows((*NEAR, 0, 0.9)), torch.zeros(0, 5)),
        Detections(rows((*NEAR, 0, 0.9)), rows((*NEAR, 0))),
    )
    val, test = ([empty] * 2, [full]) if part == "validation" else ([full], [empty] * 2)
    metrics = Detection()(BoxSnapshot(9, CLASSES, val, test, [], is_finite=True)).metrics
    assert {name.startswith("detect/test_") for name in metrics} == {part == "validation"}
    (record,) = caplog.records
    assert record.message == f"no average precision: none of the 2 {part} pictures has a box"


def test_without_pictures_nothing_is_measured_or_said(caplog):
    assert Detection()(BoxSnapshot(0, CLASSES, [], [], [], is_finite=True)).metrics == {}
    assert not caplog.records


def test_the_test_part_has_its_own_metrics_and_pictures_show_high_scores_only():
    both = Detections(rows((*NEAR, 0, 0.9), (*FAR, 1, 0.1)), rows((*NEAR, 0)))
    grey = torch.full((3, 320, 500), 90, dtype=torch.uint8)
    snapshot = BoxSnapshot(9, CLASSES, [both], [both], [grey], is_finite=True)
    evaluation = Detection(shown_score=0.5)(snapshot)
    assert evaluation.metrics["detect/test_map50"] == evaluation.metrics["detect/map50"] == pytest.approx(100)
    (picture,) = evaluation.pictures
    left, right = picture.pixels.split(picture.pixels.shape[1] // 2, dim=1)
    frames = [((side == torch.tensor([230, 60, 50])).all(dim=2)).sum().item() for side in (left, right)]
    assert frames[1] > frames[0] > 200  # the same frame twice, the right one with a score beside the name
    assert not (picture.pixels == torch.tensor([40, 120, 230])).all(dim=2).any()  # the colour of low scores
    with pytest.raises(ValueError, match="shown_score=2"):
        checked(Detection, shown_score=2.0)


def test_frames_are_scaled_with_their_picture():
    """Two routes: a picture and its boxes of twice the size look the same in a report."""

    def drawn(scale: int) -> torch.Tensor:
        box = torch.tensor([[40.0, 80, 200, 300]]) * scale
        pair = Detections(torch.cat([box, torch.tensor([[1, 0.9]])], dim=1), torch.cat([box, torch.zeros(1, 1)], dim=1))
        grey = torch.full((3, 400 * scale, 400 * scale), 90, dtype=torch.uint8)
        return Detection()(BoxSnapshot(9, CLASSES, [pair], [], [grey], is_finite=True)).pictures[0].pixels

    assert torch.equal(drawn(1), drawn(2))


def test_a_frame_is_drawn_on_the_edges_of_its_box():
    boxes = torch.tensor([[20.0, 30, 60, 50]])
    drawn = draw_boxes(torch.zeros(3, 60, 80, dtype=torch.uint8), boxes, [""], [(255, 0, 0)])
    red = drawn[0] > 0
    assert red[30:51, 20:61].sum() >= red.sum() - 20
    assert red[30, 30:60].all()
    assert red[50, 20:61].all()
    assert not red[33:48, 23:58].any()


class Oracle(nn.Module):
    """Finds a box in the middle of every clip."""

    def detect(self, clips):
        assert not self.training
        return [torch.tensor([[8.0, 8, 24, 24, 0, 1.0]])] * len(clips)


class Halved:
    """In place of WholePictures: clips are pictures of half the size."""

    def __call__(self, pictures):
        return torch.stack([picture[..., ::2, ::2].float() for picture in pictures])

    def restore(self, boxes, size):
        return boxes * 2


def prober_of(dataset, **changes) -> DetectionSnapshotter:
    values = {"transform": Halved(), "session": CPU, "batch_size": 32, "val_samples": 9, "seed": 0, "last_step": 4}
    return DetectionSnapshotter(dataset=dataset, **(values | changes))


@pytest.fixture
def three_parts(tmp_path):
    images = {name: xml(("ant", 16, 16, 48, 40)) for name in "abcd"}
    return voc(write_voc(tmp_path, images, {"train": ["a"], "val": ["b", "c"], "test": ["d"]}), test_split="test")


def test_a_snapshot_has_the_validation_part_and_at_the_end_the_test_part(three_parts):
    prober, model = prober_of(three_parts), Oracle().train()
    begin, end = (prober.snapshot(step, model) for step in (0, 4))
    assert (len(begin.val), len(begin.test), len(end.test)) == (2, 0, 1)
    assert end.val[0].predictions.tolist() == [[16, 16, 48, 48, 0, 1]]
    assert end.val[0].ground_truth.tolist() == [[16, 16, 48, 40, 0]]
    assert end.pictures[0].shape == (3, 40, 60)
    assert model.training
    assert "2 whole pictures of the validation part, and 1 test pictures" in prober.protocol


def test_unreadable_pictures_are_left_out_and_named_once(three_parts, caplog):
    Path(three_parts.validation().describe(0)).write_bytes(b"no picture")
    prober = prober_of(three_parts)
    snapshots = [prober.snapshot(step, Oracle()) for step in (0, 1)]
    assert [(len(s.val), len(s.pictures)) for s in snapshots] == [(1, 1)] * 2
    assert sum("left out: " in record.message for record in caplog.records) == 1


def test_pictures_none_of_which_can_be_read_end_the_evaluation_in_one_line_and_give_no_number(three_parts):
    for index in range(2):
        Path(three_parts.validation().describe(index)).unlink()
    with pytest.raises(RunError, match=r"^no validation sample can be read; the first: .*b\.png: .*No such file.*$"):
        prober_of(three_parts).snapshot(0, Oracle())


def test_an_evaluation_reports_weights_that_are_not_finite(three_parts):
    blown = nn.Linear(1, 1)
    nn.init.constant_(blown.weight, float("inf"))
    assert not prober_of(three_parts).snapshot(0, blown).is_finite


def test_without_a_held_out_part_evaluators_are_refused(tmp_path):
    dataset = voc(write_voc(tmp_path, {"a": xml(("ant", 1, 1, 9, 9))}, {"train": ["a"]}), val_split=None)
    with pytest.raises(ValueError, match="no held-out part"):
        prober_of(dataset, evaluators=[Detection()])
    assert prober_of(dataset).num_samples == 0


def test_table_and_verdict_name_the_detection_metrics():
    table = [
        {"step": 0, "detect/map50": 0.4, "detect/map": 0.1},
        {"step": 9, "detect/map50": 62.5, "detect/map": 31.0, "detect/test_map50": 60.0},
    ]
    lines = final_table(table).terminal().splitlines()
    assert lines[0].split() == ["mAP", "mAP@.5", "test", "mAP@.5"]
    assert lines[1].split() == ["untrained", "detector", "0.1", "%", "0.4", "%", "-"]
    assert lines[2].startswith("trained detector, step 9")
    result = verdict(table)
    assert result.word == "learning"
    assert result.reason == "the mAP@.5 is at 62.5 %, 62.1 points above the start's 0.4 %"
    assert verdict([table[0], table[0] | {"step": 9}]).reason.endswith("0.4 %: train longer, or change lr")
    assert selection_metric(table[1], None) == "detect/map50"


# runs


RUN = [
    "objective=detect", "dataset=voc", "image_size=32", "encoder.patch_size=8", "encoder.embed_dim=16",
    "encoder.depth=1", "encoder.num_heads=2", "objective.width=8", "objective.regions=16", "batch_size=4", "steps=4",
    "save_every=2", "eval_every=4", "log_every=1", "num_workers=0", "logger=none", "dataset.test_split=test",
    "lr=1e-3", "encoder.drop_path=0.2",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    images = {f"{number}": xml(("ant", 5 + number, 6, 30, 30), ("bee", 30, 10, 50, 38)) for number in range(8)}
    images["8"] = xml()
    splits = {"train": [*images], "val": ["0", "1"], "test": ["2"]}
    return write_voc(tmp_path_factory.mktemp("voc"), images, splits)


def agent(data, folder, *changes):
    return JEPAAgent(JEPAConfig(*RUN, f"dataset.root_path={data}", *changes), folder=folder)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "finished"
    agent(data, folder).train()
    return folder


@pytest.mark.slow
def test_a_run_logs_losses_and_precisions_and_shows_boxes(finished):
    names = {name for row in read_rows(finished) for name in row}
    terms = {f"train/{name}" for name in ("classifier", "box_reg", "objectness", "rpn_box_reg")}
    assert terms | {"detect/map", "detect/map50", "detect/map75", "detect/ap50_ant", "detect/test_map50"} <= names
    assert (finished / "media" / "step_00000004" / "boxes.png").is_file()
    report = (finished / "report.html").read_text()
    assert "Are objects found?" in report
    assert "Average precision by class" in report
    assert "no measure of progress" not in report
    assert "trained detector, step 4" in report
    encoder = load_encoder(finished)
    assert torch.equal(encoder.embed.weight, load_model(find(finished))["encoder.embed.weight"])


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights(data, finished, tmp_path):
    parted = tmp_path / "parted"
    shutil.copytree(finished, parted, symlinks=True)
    shutil.rmtree(parted / "checkpoints" / "step_00000004")
    for link in ("last", "best"):
        (parted / "checkpoints" / link).unlink(missing_ok=True)
    (parted / "checkpoints" / "last").symlink_to("step_00000002")
    (parted / "run.json").write_text((finished / "run.json").read_text().replace("finished", "stopped"))
    agent(data, parted).train()
    one, two = (load_model(find(folder)) for folder in (finished, parted))
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_micro_batches_train_the_head_and_leave_a_frozen_encoder_alone(data, tmp_path):
    agent(
        data, tmp_path, "objective.freeze=true", "micro_batch_size=2", "evaluator=[]", "save_every=1", "steps=2"
    ).train()
    before, after = (load_model(tmp_path / "checkpoints" / f"step_0000000{step}") for step in (1, 2))
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert not [name for name in changed if name.startswith("encoder.")]
    assert {"pyramid.levels.0.1.weight", "detector.rpn.head.cls_logits.weight"} <= changed


def test_a_detector_is_not_trained_on_a_data_set_without_boxes(tmp_path):
    write_voc(
        tmp_path / "voc",
        {"a": xml(), "b": xml(("ant", 9, 9, 9, 9))},
        {"train": ["a", "b"], "val": ["a"], "test": ["a"]},
    )
    with pytest.raises(ConfigError, match="Detector learns from boxes, and VOC has none"):
        agent(tmp_path / "voc", tmp_path / "run", "dataset.classes=[ant]", "batch_size=2").train()


def test_other_objectives_train_on_the_images_and_ignore_the_boxes(data, tmp_path):
    small = [text for text in RUN if not text.startswith(("objective", "dataset.test"))]
    changes = ["objective=mae", "objective.decoder_depth=1", "mask=random", "evaluator=[diagnostics]", "steps=1"]
    JEPAAgent(JEPAConfig(*small, f"dataset.root_path={data}", *changes), folder=tmp_path).train()
    assert not [name for row in read_rows(tmp_path) for name in row if name.startswith("detect/")]
