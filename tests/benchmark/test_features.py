"""Samples, features, feature cache and trained probes of jepa-eval."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from synthetic_features import clusters
from torch import nn
from torch.nn import functional as F

from jepa.benchmark.features import Baseline, FeatureCache, hog
from jepa.benchmark.results import summary, trial
from jepa.data.transforms import EvalTransform
from jepa.encoders.pretrained import open_encoder
from jepa.encoders.spatial import SpatialEncoder
from jepa.errors import ConfigError, RunError
from jepa.evaluation.attentive import AttentiveProbe
from jepa.evaluation.frozen import FrozenEncoder
from jepa.evaluation.linear import LinearProbe
from jepa.evaluation.linear_sgd import MOMENTUM, SGDProbe
from jepa.evaluation.probe import ProbeTask
from jepa.evaluation.readout import pool_tokens
from jepa.evaluation.samples import raw_pixels
from jepa.evaluation.splits import few_shot_rows, labelled_splits
from jepa.parallel.session import Session
from jepa.reports.statistics import wilson
from jepa.schedules import cosine

CPU = Session(device=torch.device("cpu"), bf16=False)


class Toy:
    """Random pictures in memory, a few of them unreadable, `per_source` clips of one source."""

    channels, mean, std = 3, (0.5, 0.5, 0.5), (0.3, 0.3, 0.3)

    def __init__(self, labels, *, unreadable=(), held_out=None, num_frames=1, per_source=0, lists_labels=True):
        self.answers, self.unreadable, self.held_out = np.asarray(labels), set(unreadable), held_out
        self.classes = ("ant", "bee", "cat")
        self.num_frames = num_frames
        self.reads = 0
        if lists_labels:
            self.labels = self.answers
        if per_source:
            self.source = lambda index: index // per_source

    def __len__(self):
        return len(self.answers)

    def __getitem__(self, index):
        self.reads += 1
        if index in self.unreadable:
            raise OSError("torn")
        shape = (3, self.num_frames, 16, 16)
        return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(index), dtype=torch.uint8), int(
            self.answers[index]
        )

    def describe(self, index):
        return f"toy {index}"

    def validation(self):
        return self.held_out


def parts_of(dataset, **changes):
    return labelled_splits(
        dataset, **({"train_samples": None, "test_samples": None, "seed": 0, "num_workers": 0} | changes)
    )


def encoder_of(seed=0, frames=1):
    torch.manual_seed(seed)
    encoder = SpatialEncoder(clip_shape=(3, frames, 16, 16), patch_size=4, embed_dim=16, depth=3, num_heads=2)
    encoder.transform = EvalTransform(image_size=(16, 16), mean=(0.5,) * 3, std=(0.3,) * 3)
    return encoder.eval()


def frozen(encoder=None, readout="mean", layers=1, further=()):
    encoder = encoder or encoder_of()
    return FrozenEncoder(
        encoder=encoder, transform=encoder.transform, session=CPU, readout=readout, layers=layers, further=further
    )


# which samples


def test_the_test_part_is_the_held_out_one_and_all_of_it_is_used():
    parts = parts_of(Toy([0, 1, 2] * 5, held_out=Toy([0, 1, 2, 1])))
    assert parts.train.labels.tolist() == [0, 1, 2] * 5
    assert parts.test.labels.tolist() == [0, 1, 2, 1]
    assert "of the held-out part" in parts.description
    assert not parts.warnings


def test_without_a_held_out_part_no_source_is_on_both_sides():
    parts = parts_of(Toy([0, 1, 2] * 8, per_source=3))
    sources = [{index // 3 for index in part.indices} for part in parts[:2]]
    assert all(sources)
    assert not sources[0] & sources[1]
    assert "held out of the training set" in parts.description
    assert parts.train.num_sources == len(sources[0]) < len(parts.train.indices)


def test_samples_without_a_label_are_left_out_and_counted_also_where_labels_are_read():
    labels = [0, -1, 1, 2, -1, 0]
    for lists_labels in (True, False):
        parts = parts_of(Toy(labels, held_out=Toy([0, 1]), lists_labels=lists_labels))
        assert parts.train.indices == (0, 2, 3, 5)
        assert "2 without a label" in parts.description


def test_without_labels_one_sentence_says_so():
    with pytest.raises(ConfigError, match="no training sample has a label"):
        parts_of(Toy([-1] * 6, held_out=Toy([0, 1])))
    with pytest.raises(ConfigError, match="are of one class"):
        parts_of(Toy([1] * 6, held_out=Toy([0, 1])))


def test_classes_that_a_part_lacks_are_named_with_what_follows():
    warnings = parts_of(Toy([0, 0, 1, 1], held_out=Toy([0, 2, 2]))).warnings
    assert any('no training sample of class "cat": its 2 test samples count as wrong' in text for text in warnings)
    assert any('no test sample of class "bee"' in text for text in warnings)


def test_what_a_training_part_lacks_is_never_answered():
    train, test = clusters(60, classes=2), clusters(30, classes=3, seed=5)
    for probe in (LinearProbe(), SGDProbe(epochs=5, batch_size=32, lrs=[0.1], weight_decays=[0.0])):
        assert probe.predict(ProbeTask(train, test, 3)).predicted.max() < 2


@pytest.mark.parametrize("shots", [0.1, 0.3, 1, 4])
def test_few_shot_splits_are_stratified_with_exact_counts(shots):
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 10)[
        torch.randperm(70, generator=torch.Generator().manual_seed(1))
    ]
    rows = few_shot_rows(labels, shots, 0, Toy([0]).classes)
    expected = [shots] * 3 if shots >= 1 else [round(shots * size) for size in (40, 20, 10)]
    assert labels[rows].bincount().tolist() == expected
    assert torch.equal(rows, few_shot_rows(labels, shots, 0, Toy([0]).classes))
    assert not torch.equal(rows, few_shot_rows(labels, shots, 1, Toy([0]).classes))


def test_smaller_few_shot_splits_lie_inside_larger_ones():
    labels = torch.arange(3).repeat(30)
    chosen = [set(few_shot_rows(labels, shots, 7, "abc").tolist()) for shots in (1, 3, 0.2, 0.5, 30)]
    assert all(small < large for small, large in pairwise(chosen))


def test_a_class_with_too_few_samples_is_named():
    with pytest.raises(ConfigError, match='shots=3: class "bee" has only 2'):
        few_shot_rows(torch.tensor([0, 0, 0, 1, 1]), 3, 0, Toy([0]).classes)


# which features


@pytest.mark.parametrize("frames", [1, 2])
def test_two_layers_are_those_of_a_shorter_encoder_and_of_the_whole_one(frames):
    encoder, clips = encoder_of(frames=frames), torch.randint(0, 256, (3, 3, frames, 16, 16), dtype=torch.uint8)
    encoded = frozen(encoder, layers=2).encode(clips, 16 * frames)
    seen = encoder.transform(clips)
    with torch.no_grad():
        last = encoder(seen)
        encoder.blocks = encoder.blocks[:-1]
        before = encoder(seen)
    torch.testing.assert_close(encoded.vectors, torch.cat([before.mean(1), last.mean(1)], dim=1))
    torch.testing.assert_close(encoded.tokens.float(), torch.cat([before, last], dim=2), atol=2e-3, rtol=2e-3)


def test_the_readouts_are_what_they_say():
    encoder, clips = encoder_of(frames=2), torch.randint(0, 256, (3, 3, 2, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        tokens = encoder(encoder.transform(clips))
    steps = torch.cat([tokens[:, :16].mean(1), tokens[:, 16:].mean(1)], dim=1)
    moments = torch.cat([tokens.mean(1), tokens.var(1, correction=0).sqrt()], dim=1)
    grid = tokens.unflatten(1, (2, 4, 4)).mean(1)  # [b, 4, 4, D]
    quarters = [grid[:, top : top + 2, left : left + 2].mean((1, 2)) for top in (0, 2) for left in (0, 2)]
    few = pool_tokens(tokens, encoder.grid, 16)
    expected_of = {
        "mean": tokens.mean(1), "steps": steps, "mean_std": moments, "grid2": torch.cat(quarters, dim=1),
        "tokens": few.flatten(1), "layers": frozen(encoder, layers=3).encode(clips, 0).vectors,
    }  # fmt: skip
    assert few.shape[1] <= 16
    for readout, expected in expected_of.items():
        torch.testing.assert_close(frozen(encoder, readout).encode(clips, 0).vectors, expected)
    together = frozen(encoder, further=("grid2", "layers")).encode(clips, 0)
    assert together.readouts.keys() == {"grid2", "layers"}
    for readout, vectors in {"mean": together.vectors, **together.readouts}.items():
        torch.testing.assert_close(vectors, expected_of[readout])
    with pytest.raises(ConfigError, match="readout=cls: the encoder has no class token"):
        frozen(encoder, "cls")
    with pytest.raises(ConfigError, match="layers=4: the encoder has 3 blocks"):
        frozen(encoder, layers=4)


def test_class_token_and_layers_of_timm_are_those_of_its_own_functions():
    encoder: Any = open_encoder("timm:vit_tiny_patch16_224", clip_shape=(3, 1, 32, 32), fresh=True)
    pictures = torch.randint(0, 256, (2, 3, 1, 32, 32), dtype=torch.uint8)
    images = encoder.transform(pictures)[:, :, 0]
    own: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0).eval()
    own.load_state_dict(encoder.trunk.state_dict())
    with torch.no_grad():
        last = own.forward_features(images)
        before = own.forward_intermediates(images, indices=2, norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(frozen(encoder, "cls").encode(pictures, 0).vectors, last[:, 0])
    two = frozen(encoder, layers=2).encode(pictures, 0).vectors
    torch.testing.assert_close(two, torch.cat([before.mean((2, 3)), last[:, 1:].mean(1)], dim=1))


def test_pixels_are_means_of_squares_and_hog_sees_no_brightness():
    pictures = torch.randint(0, 128, (2, 3, 3, 32, 32), dtype=torch.uint8)
    squares = pictures.float().mean(2).unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean((3, 5)) / 255
    torch.testing.assert_close(raw_pixels(pictures), squares.flatten(1))
    pytest.importorskip("skimage")
    torch.testing.assert_close(hog(pictures), hog(pictures + 100))
    assert torch.equal(hog(pictures), hog(pictures[:, :, 1:2]))
    assert hog(pictures).shape == (2, 7 * 7 * 2 * 2 * 9)


# what is kept


def test_kept_features_are_not_made_again_and_those_of_another_encoder_are(tmp_path):
    dataset = Toy([0, 1, 2] * 4, held_out=Toy([0, 1]))
    part = parts_of(dataset).train
    first = FeatureCache(tmp_path, 5).features("a", frozen(), part)
    reads = dataset.reads
    again = FeatureCache(tmp_path, 5).features("a", frozen(), part)
    assert torch.equal(first.vectors, again.vectors)
    assert dataset.reads == reads
    other = FeatureCache(tmp_path, 5).features("a", frozen(encoder_of(seed=1)), part)
    assert dataset.reads == reads + len(part.indices)
    assert not torch.allclose(first.vectors, other.vectors)


@pytest.mark.parametrize("changed", ["weight", "layers", "readout", "samples", "labels", "transform"])
def test_whatever_features_depend_on_makes_new_ones(changed, tmp_path):
    cache, encoder = FeatureCache(tmp_path, 8), encoder_of()
    dataset = Toy([0, 1, 2] * 4, held_out=Toy([0, 1]))
    cache.features("a", frozen(encoder), parts_of(dataset).train)
    known = set(tmp_path.iterdir())
    labels, readout, layers, limit = [0, 1, 2] * 4, "mean", 1, None
    if changed == "weight":
        encoder.norm.bias.data[0] += 1e-3
    elif changed == "transform":
        encoder.transform = EvalTransform(image_size=(16, 16), mean=(0.5,) * 3, std=(0.2,) * 3)
    elif changed == "labels":
        labels = [2, 1, 0] * 4
    readout, layers = ("steps" if changed == "readout" else readout), (2 if changed == "layers" else layers)
    limit = 6 if changed == "samples" else limit
    part = parts_of(Toy(labels, held_out=Toy([0, 1])), train_samples=limit).train
    cache.features("a", frozen(encoder, readout, layers), part)
    assert len(set(tmp_path.iterdir()) - known) == 1


def test_tokens_come_beside_the_same_vectors_and_damaged_files_are_made_again(tmp_path, caplog):
    part, encoder = parts_of(Toy([0, 1, 2] * 2, held_out=Toy([0, 1]))).train, encoder_of()
    plain = FeatureCache(tmp_path, 4).features("a", frozen(encoder), part)
    features = FeatureCache(tmp_path, 4).features("a", frozen(encoder), part, 4)
    with torch.no_grad():
        clips = encoder.transform([part.dataset[index][0] for index in part.indices])
        expected = pool_tokens(encoder(clips), encoder.grid, 4)
    torch.testing.assert_close(features.vectors, plain.vectors)
    torch.testing.assert_close(features.tokens.float(), expected, atol=2e-3, rtol=2e-3)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:40])
    assert torch.equal(FeatureCache(tmp_path, 4).features("a", frozen(encoder), part, 4).vectors, features.vectors)
    assert "is damaged" in caplog.text


def test_tokens_that_memory_cannot_hold_are_refused_with_what_it_can(monkeypatch):
    part, encoder = parts_of(Toy([0, 1, 2] * 3, held_out=Toy([0, 1]))).train, encoder_of()
    size = FeatureCache(None, 4).features("a", frozen(encoder), part, 4).tokens[0].nbytes
    monkeypatch.setattr("jepa.benchmark.features.free_memory", lambda: 10 * size)
    with pytest.raises(RunError, match=r"encoding a: 4 tokens of 9 training samples .* give train_samples=8 or less"):
        FeatureCache(None, 4).features("a", frozen(encoder), part, 4)
    FeatureCache(None, 4).features("a", frozen(encoder), parts_of(part.dataset, train_samples=8).train, 4)


def test_features_that_the_disk_cannot_take_are_used_all_the_same(tmp_path, monkeypatch, caplog):
    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jepa.benchmark.features.save_file", full)
    part = parts_of(Toy([0, 1, 2] * 2, held_out=Toy([0, 1]))).train
    assert len(FeatureCache(tmp_path, 4).features("a", frozen(), part).vectors) == 6
    assert "features are not cached: [Errno 28] No space left on device" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_unreadable_samples_are_left_out_and_named(caplog):
    part = parts_of(Toy([0, 1, 2] * 3, unreadable=[1, 4], held_out=Toy([0, 1]))).train
    features = FeatureCache(None, 4).features("a", frozen(), part)
    assert features.labels.tolist() == [0, 2, 0, 2, 0, 1, 2]
    assert part.broken.keys() == {1, 4}
    assert "left out: toy 4: torn" in caplog.text
    with pytest.raises(RunError, match="no training sample can be read; the first: toy 0: torn"):
        FeatureCache(None, 4).features(
            "a", frozen(), parts_of(Toy([0, 1], unreadable=[0, 1], held_out=Toy([0, 1]))).train
        )


def test_workers_read_the_same_features_in_the_same_order():
    floor = Baseline("pixels", encoder_of().transform)
    one, two = (
        FeatureCache(None, 3).features(
            "a", floor, parts_of(Toy([0, 1, 2] * 3, held_out=Toy([0, 1])), num_workers=n).train
        )
        for n in (0, 2)
    )
    assert torch.equal(one.vectors, two.vectors)


# probes


def test_the_heads_of_the_grid_are_those_trained_one_by_one():
    train, grid = clusters(90, spread=2.0), [(0.03, 0.0), (0.3, 0.01), (0.001, 0.1)]
    probe = SGDProbe(epochs=3, batch_size=32, lrs=[0.1], weight_decays=[0.0])
    task = ProbeTask(train, train, 3, seed=4)
    heads = probe.fit(train, grid, task)
    for number, (lr, decay) in enumerate(grid):
        layer = nn.Linear(8, 3)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=decay)
        generator, step = torch.Generator().manual_seed(4), 0
        for _ in range(3):
            for rows in torch.randperm(90, generator=generator).chunk(3):
                optimizer.param_groups[0]["lr"] = cosine(step, 9, lr, 0.0)
                optimizer.zero_grad()
                F.cross_entropy(layer(train.vectors[rows]), train.labels[rows]).backward()
                optimizer.step()
                step += 1
        torch.testing.assert_close(heads.weight[number], layer.weight.data, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(heads.bias[number], layer.bias.data, atol=1e-5, rtol=1e-4)


PROBES = {
    "linear": LinearProbe(),
    "sgd": SGDProbe(epochs=5, batch_size=32, lrs=[1e-4, 0.1], weight_decays=[0.0, 0.1]),
    "attentive": AttentiveProbe(epochs=1, batch_size=32, max_tokens=4),
}


@pytest.mark.parametrize("name", PROBES)
def test_no_choice_sees_a_test_label(name):
    train, test = (f._replace(tokens=f.vectors[:, None].half()) for f in (clusters(60), clusters(40, seed=5)))
    permuted = test._replace(labels=test.labels[torch.randperm(40, generator=torch.Generator().manual_seed(0))])
    one, two = (PROBES[name].predict(ProbeTask(train, part, 3)) for part in (test, permuted))
    assert one.chosen == two.chosen
    assert one.chosen
    assert torch.equal(one.predicted, two.predicted)


def test_the_seed_of_a_task_draws_the_attentive_probe_anew():
    train, test = (
        f._replace(tokens=f.vectors[:, None].half())
        for f in (clusters(60, spread=4.0), clusters(80, seed=5, spread=4.0))
    )
    answers = [PROBES["attentive"].predict(ProbeTask(train, test, 3, seed)).predicted for seed in (0, 0, 1)]
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])


# numbers


def test_a_row_is_the_mean_of_its_trials():
    labels, train = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1])
    trials = [
        trial(torch.tensor(predicted), labels, train, 2, seed, {"l2": 1.0})
        for seed, predicted in enumerate(([0, 0, 1, 1], [0, 0, 0, 0]))
    ]
    result = SimpleNamespace(**summary(trials, 4))
    assert result.top1 == 75
    assert (result.low, result.high) == tuple(100 * end for end in wilson(0.75, 4))
    assert result.deviation == pytest.approx(50 / math.sqrt(2))
    assert result.per_class == [100, 50]
    assert result.confusion == [[4, 0], [2, 2]]
    assert result.balanced is None
    uneven = trial(torch.zeros(60, dtype=torch.long), torch.tensor([0] * 57 + [1] * 3), train, 2, 0, {})
    assert uneven.balanced == 50
    assert uneven.top1 == 95
