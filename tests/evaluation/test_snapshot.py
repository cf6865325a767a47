"""Splits of the probes, and snapshots that do not affect the training."""

import pytest
import torch
from toy_model import CPU, Crop, Images, Toy, random_masker

from jepa.evaluation.diagnostics import Diagnostics
from jepa.evaluation.embeddings import Embeddings
from jepa.evaluation.knn import KNN, knn_votes
from jepa.evaluation.linear import LinearProbe
from jepa.evaluation.snapshot import Snapshotter
from jepa.evaluation.splits import probe_splits

EVALUATORS = (KNN(k=5, temperature=0.07), LinearProbe(), Diagnostics(), Embeddings(rows=10))


def snapshotter_of(dataset, **changes):
    values = {
        "dataset": dataset, "transform": Crop(), "masker": random_masker, "session": CPU,
        "batch_size": 8, "train_samples": 30, "val_samples": 12, "seed": 0,
    }  # fmt: skip
    return Snapshotter(**(values | changes))


def test_without_a_validation_set_the_validation_samples_are_held_out_of_the_training_set():
    dataset = Images(50)
    split = probe_splits(dataset, train_samples=30, val_samples=12, seed=0)
    assert (len(split.train.indices), len(split.val.indices)) == (30, 12)
    assert not set(split.train.indices) & set(split.val.indices)
    assert split.val.dataset is dataset
    assert "held out of the training set" in split.protocol


def test_a_validation_set_is_used_if_there_is_one():
    held_out = Images(10)
    split = probe_splits(Images(50, held_out=held_out), train_samples=30, val_samples=12, seed=0)
    assert split.val.dataset is held_out
    assert sorted(split.val.indices) == list(range(10))
    assert "10 samples of the validation set" in split.protocol


def test_the_split_depends_on_the_seed_alone():
    first, again, other = (probe_splits(Images(50), train_samples=30, val_samples=12, seed=s) for s in (0, 0, 1))
    assert first.train.indices == again.train.indices
    assert first.val.indices == again.val.indices
    assert first.train.indices != other.train.indices


@pytest.mark.parametrize("num", [2, 3, 8])
def test_a_tiny_data_set_still_has_both_parts(num):
    split = probe_splits(Images(num), train_samples=4096, val_samples=2048, seed=0)
    assert len(split.train.indices) + len(split.val.indices) == num
    assert len(split.train.indices) >= len(split.val.indices) >= 1


def test_impossible_splits_are_refused_by_name():
    with pytest.raises(ValueError, match="val_samples=0"):
        probe_splits(Images(50), train_samples=10, val_samples=0, seed=0)
    with pytest.raises(ValueError, match="the data set has 1"):
        probe_splits(Images(1), train_samples=10, val_samples=5, seed=0)


# snapshots


def test_a_snapshot_holds_the_pooled_tokens_of_the_backbone():
    dataset, objective = Images(50), Toy()
    snapshotter = snapshotter_of(dataset)
    snapshot = snapshotter.snapshot(7, objective)
    pictures = torch.stack([dataset[index][0][..., :16] for index in snapshotter.splits.val.indices])
    with torch.no_grad():
        tokens = objective.eval().backbone(pictures.float() / 255)
    assert snapshot.step == 7
    torch.testing.assert_close(snapshot.val.vectors, tokens.mean(1))
    torch.testing.assert_close(snapshot.tokens, tokens[:8])
    assert torch.equal(snapshot.pictures, pictures[:8])
    assert snapshot.val.labels.tolist() == [index % 3 for index in snapshotter.splits.val.indices]
    assert snapshot.train.vectors.shape == (30, 8)
    assert snapshot.thumbnails.shape == (12, 3, 32, 32)
    assert torch.equal(snapshot.thumbnails[:, :, ::2, ::2], pictures[:, :, 0])


def test_a_snapshot_restores_modes_and_random_state():
    objective = Toy()
    objective.train()
    objective.frozen.eval()
    before = torch.get_rng_state()
    snapshot = snapshotter_of(Images(50)).snapshot(0, objective)
    for evaluator in EVALUATORS:
        evaluator(snapshot)
    assert torch.equal(torch.get_rng_state(), before)
    assert objective.backbone.drop.training
    assert not objective.frozen.training
    assert all(parameter.grad is None for parameter in objective.parameters())


def test_two_snapshots_of_one_encoder_are_equal():
    snapshotter, objective = snapshotter_of(Images(50)), Toy()
    first, second = snapshotter.snapshot(0, objective), snapshotter.snapshot(9, objective)
    assert torch.equal(first.val.vectors, second.val.vectors)
    assert torch.equal(first.masks.context, second.masks.context)
    assert first.diagnosis == second.diagnosis


def test_the_diagnosis_is_the_mean_over_validation_samples_each_with_its_masks():
    snapshotter, objective = snapshotter_of(Images(50)), Toy()
    snapshot = snapshotter.snapshot(0, objective)
    assert [len(batch.labels) for batch, _ in objective.calls] == [8, 4]
    assert torch.equal(objective.calls[1][1].context, snapshotter.masks.context[8:12])
    assert snapshot.diagnosis["error"] == pytest.approx(snapshot.val.labels.float().mean().item())


def test_raw_pixels_are_probed_like_features_under_baseline_names():
    snapshotter = snapshotter_of(Images(50))
    snapshot = snapshotter.snapshot(0, Toy())
    baselines = snapshotter.baselines(snapshot, EVALUATORS)
    pixel_metrics = {"baseline/pixels_knn_top1", "baseline/pixels_linear_top1", "baseline/pixels_rank"}
    assert set(baselines) == pixel_metrics | {"baseline/constant_top1"}
    pixels = [
        torch.stack([snapshotter.splits.train.dataset[index][0][..., :16] for index in part.indices]).flatten(1) / 255
        for part in snapshotter.splits[:2]
    ]
    votes = knn_votes(pixels[1], pixels[0], snapshot.train.labels, num_classes=3, k=5, temperature=0.07)
    expected = 100 * (votes.argmax(1) == snapshot.val.labels).float().mean().item()
    assert baselines["baseline/pixels_knn_top1"] == pytest.approx(expected)


def test_every_evaluator_states_its_protocol():
    snapshotter = snapshotter_of(Images(50))
    assert all(len(part.protocol) > 40 for part in (snapshotter, *EVALUATORS))
    assert "30 samples of the training set" in snapshotter.protocol
    assert "the 5 nearest" in EVALUATORS[0].protocol


def test_validation_clips_are_of_other_videos_than_training_clips():
    class Clips(Images):
        def source(self, index):
            return index // 4

    dataset = Clips(40)
    split = probe_splits(dataset, train_samples=40, val_samples=5, seed=0)
    videos = [{dataset.source(index) for index in part.indices} for part in (split.train, split.val)]
    assert not videos[0] & videos[1]
    assert len(split.val.indices) == 5
    with pytest.raises(ValueError, match=r"evaluation.val_samples=5"):
        probe_splits(Clips(4), train_samples=4, val_samples=5, seed=0)
