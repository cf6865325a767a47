"""Fine-tuning for classification: its loss and rates against independent formulas, and what holds of a whole run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checked import checked
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, top_k_accuracy_score
from synthetic_features import snapshot_of

from jepa import JEPAAgent, JEPAConfig
from jepa.cli.finetune import main, to_train_arguments
from jepa.config import ConfigError, compose
from jepa.encoders.spatial import SpatialEncoder
from jepa.encoders.temporal import TemporalEncoder
from jepa.evaluation.accuracy import Accuracy, confusion_shares
from jepa.evaluation.types import Features
from jepa.objectives.classify import Classification
from jepa.optim import parameter_groups, set_schedule
from jepa.reports.verdict import Verdict, collapse_alarm, verdict
from jepa.resources.estimate import model_cost
from jepa.runs.metrics import read_rows
from jepa.training.assemble import check_labels, make_dataset
from jepa.types import Batch, Masks

CLASSES = ("ant", "bee", "cat", "dog")
B, IMAGE, CLIP = 6, (3, 1, 16, 16), (3, 4, 16, 16)
NONE = Masks(torch.zeros(B, 0, dtype=torch.long), torch.zeros(B, 0, 0, dtype=torch.long))
SIZES: dict[str, Any] = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}


def make(encoder: Any = None, **changes: Any) -> Classification:
    """With a head that is no longer zero."""
    torch.manual_seed(0)
    objective = Classification(encoder=encoder or SpatialEncoder(clip_shape=IMAGE, **SIZES), classes=CLASSES, **changes)
    torch.nn.init.normal_(objective.classifier.classify.weight)
    return objective


def sample(shape: tuple[int, ...] = IMAGE, labels: tuple[int, ...] = (0, 1, 2, 3, 1, 0)) -> Batch:
    clips = torch.randn(B, *shape, generator=torch.Generator().manual_seed(1))
    return Batch(clips, {"labels": torch.tensor(labels)})


def probabilities(objective: Classification, clips: torch.Tensor) -> np.ndarray:
    return objective.classifier(clips).double().softmax(1).detach().numpy()


def test_loss_is_the_cross_entropy_of_smoothed_labels() -> None:
    objective, batch = make(label_smoothing=0.2), sample()
    predicted = probabilities(objective, batch.clips)
    plain = log_loss(batch.labels, predicted, labels=range(4))
    uniform = -np.log(predicted).mean()
    assert objective(batch, NONE).loss.item() == pytest.approx(0.8 * plain + 0.2 * uniform, rel=1e-5)


def test_samples_without_a_label_do_not_count() -> None:
    objective, batch = make(), sample(labels=(0, -1, 2, -1, 1, 0))
    has_label = batch.labels >= 0
    alone = Batch(batch.clips[has_label], {"labels": batch.labels[has_label]})
    assert objective(batch, NONE).loss.item() == pytest.approx(objective(alone, NONE).loss.item(), rel=1e-6)
    nothing = objective(sample(labels=(-1,) * B), NONE).loss
    nothing.backward()
    assert nothing.item() == 0


@pytest.mark.parametrize("shape", [IMAGE, CLIP])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_mixed_batch_has_the_labels_of_the_pixels_that_it_has(kind: str, shape: tuple[int, ...]) -> None:
    objective = make(label_smoothing=0.0, **{kind: 1.0})
    batch = sample()
    clips = torch.arange(B, dtype=torch.float)[:, None, None, None, None].expand(B, *shape)
    torch.manual_seed(3)
    mixed, targets = objective.mix(clips, objective.targets(torch.tensor([0, 1, 2, 3, 0, 1])))
    other = clips.roll(1, 0)
    share = (mixed - other)[1:].abs().flatten(1).mean(1)  # neighbours differ by one
    assert 0.02 < share[0] < 0.98
    assert torch.allclose(share, share[0].expand(B - 1), atol=1e-6)
    expected = torch.stack([targets[row, label] for row, label in enumerate([0, 1, 2, 3, 0, 1])])
    assert torch.allclose(expected[1:], share, atol=1e-5)
    assert torch.allclose(targets.sum(1), torch.ones(B))
    assert torch.equal(mixed[:, :, :1].expand_as(mixed), mixed), "all frames alike"
    objective.eval()
    plain = objective(batch, NONE).loss
    assert torch.equal(plain, make(label_smoothing=0.0).eval()(batch, NONE).loss), "nothing is mixed in evaluation"


def test_the_rate_of_a_block_is_a_power_of_the_decay() -> None:
    objective = make(layer_decay=0.5)
    groups = parameter_groups(objective, objective.lr_scales())
    optimizer = torch.optim.SGD(groups, lr=0.0)
    set_schedule(optimizer, lr=1.0, weight_decay=0.1)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: rates[id(p)] for name, p in objective.named_parameters()}
    assert len(by_name) == len(rates)
    assert by_name["classifier.classify.weight"] == by_name["classifier.encoder.norm.weight"] == 1
    assert [by_name[f"classifier.encoder.blocks.{block}.mlp.fc1.weight"] for block in range(3)] == [1 / 8, 1 / 4, 1 / 2]
    assert by_name["classifier.encoder.embed.weight"] == 1 / 16
    weights = dict(objective.named_parameters())
    assert decays[id(weights["classifier.encoder.embed.weight"])] == 0.1
    assert decays[id(weights["classifier.encoder.embed.bias"])] == 0


def test_a_frozen_encoder_stays_as_it_is_and_drops_no_path() -> None:
    encoder = SpatialEncoder(clip_shape=IMAGE, drop_path=0.5, **SIZES)
    objective, batch = make(encoder, freeze=True).train(), sample()
    before = [p.clone() for p in encoder.parameters()]
    optimizer = torch.optim.SGD(parameter_groups(objective, objective.lr_scales()), lr=1.0)
    assert torch.equal(objective(batch, NONE).loss, objective(batch, NONE).loss)
    objective(batch, NONE).loss.backward()
    optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, encoder.parameters(), strict=True))
    assert objective.classifier.classify.bias.abs().sum() > 0


def test_the_average_follows_the_weights_and_is_evaluated() -> None:
    objective, batch = make(momentum=0.9), sample()
    assert objective.average is not None
    assert objective.backbone is objective.average.encoder
    start = objective.average.classify.bias.clone()
    with torch.no_grad():
        objective.classifier.classify.bias.add_(1)
    assert objective.after_step(0) == {"momentum": 0.9}
    assert torch.allclose(objective.average.classify.bias, start + 0.1)
    tokens = objective.backbone(batch.clips)
    assert torch.equal(objective.classify(tokens), objective.average(batch.clips))


def test_an_attentive_head_reads_where_a_mean_sees_nothing() -> None:
    """Two classes whose tokens differ, but not in their mean."""
    signs = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])[:, :, None]
    tokens, labels = signs * torch.ones(16), torch.tensor([0, 1])
    losses = {}
    for pooling in ("mean", "attentive"):
        head = make(pooling=pooling).classifier
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
        for _ in range(100):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(head.read(tokens), labels)
            loss.backward()
            optimizer.step()
        losses[pooling] = loss.item()
    assert losses["mean"] == pytest.approx(np.log(2), rel=0.01)
    assert losses["attentive"] < 0.01


def test_the_query_of_an_attentive_head_does_not_decay_and_a_frozen_encoder_leaves_it_learning() -> None:
    objective, batch = make(pooling="attentive", freeze=True).train(), sample()
    objective(batch, NONE).loss.backward()
    trained = {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"classifier.query_tokens", "classifier.reader.attn.kv.weight", "classifier.classify.weight"} <= trained
    assert not any(name.startswith("classifier.encoder.") for name in trained)
    groups = parameter_groups(objective, objective.lr_scales())
    without_decay = {id(p) for group in groups if not group["decays"] for p in group["params"]}
    assert id(objective.classifier.query_tokens) in without_decay


def test_clips_are_classified_too() -> None:
    encoder = TemporalEncoder(clip_shape=CLIP, tubelet_size=2, **SIZES)
    objective = make(encoder)
    objective(sample(CLIP), NONE).loss.backward()
    assert all(p.grad is not None for p in encoder.parameters())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"classes": ("one",)}, "has 1 classes"),
        ({"label_smoothing": 1.0}, "label_smoothing=1"),
        ({"layer_decay": 0.0}, "layer_decay=0"),
        ({"mixup": -1.0}, "mixup=-1"),
        ({"momentum": 1.0}, "momentum=1.0"),
    ],
)
def test_invalid_values_are_refused(changes: dict[str, Any], expected: str) -> None:
    options: dict[str, Any] = {"encoder": SpatialEncoder(clip_shape=IMAGE, **SIZES), "classes": CLASSES} | changes
    with pytest.raises(ValueError, match=expected):
        checked(Classification, **options)


def test_confusions_are_shares_of_the_true_class() -> None:
    shares = confusion_shares(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 1]), 3)
    assert shares.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 0.0]]


@pytest.mark.filterwarnings("ignore:y_pred contains")
def test_accuracies_are_those_of_scikit_learn() -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(12, (60,), generator=random).clamp(max=7)  # the last one is the largest
    labels[:5] = -1
    logits = torch.randn(60, 12, generator=random)
    features = Features(torch.zeros(60, 4), labels)
    snapshot = replace(snapshot_of(features, features), logits=logits, classes=tuple("abcdefghijkl"))
    evaluation, (labels, logits) = Accuracy()(snapshot), (labels[5:], logits[5:])
    assert evaluation.metrics == {
        "probe/classifier_top1": pytest.approx(100 * accuracy_score(labels, logits.argmax(1))),
        "probe/classifier_balanced": pytest.approx(100 * balanced_accuracy_score(labels, logits.argmax(1))),
        "probe/classifier_top5": pytest.approx(100 * top_k_accuracy_score(labels, logits, k=5, labels=range(12))),
    }
    assert "Not among the samples: g, i, j, k, l." in evaluation.pictures[0].caption


def test_features_clustered_by_class_are_no_collapse() -> None:
    start, end = {"step": 0, "collapse/std": 1, "collapse/cosine": 0}, {"step": 9, "collapse/std": 0.01}
    rows = [start, end | {"collapse/cosine": 0.999}]
    assert collapse_alarm(rows) is not None
    rows = [row | {"probe/classifier_top1": accuracy} for row, accuracy in zip(rows, (10, 60), strict=True)]
    assert collapse_alarm(rows) is None
    assert verdict(rows) == Verdict("learning", "the classifier is at 60.0 %, 50.0 points above the start's 10.0 %")


# ---- whole runs

PLAIN = [
    *("encoder=spatial", "encoder.patch_size=8", "encoder.embed_dim=32", "encoder.depth=2", "encoder.num_heads=2"),
    *("image_size=32", "dataset.side=32", "dataset.num_samples=256", "dataset.val_samples=200", "batch_size=32"),
    *("num_workers=0", "logger=none", "log_every=1", "device=cpu", "precision=fp32", "evaluation.train_samples=64"),
    *(
        "evaluator=[accuracy]",
        "augment.crop_scale=[1.0,1.0]",
        "augment.crop_aspect=[1.0,1.0]",
        "augment.flip=false",
        "lr=3e-3",
    ),
]
SHAPES = ["objective=classify", *PLAIN]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    small = ["predictor.width=16", "predictor.depth=1", "mask=random", "evaluator=[]", "steps=2"]
    JEPAAgent(JEPAConfig(*(text for text in PLAIN if "evaluator" not in text), *small), folder=folder).train()
    return folder


@pytest.mark.slow
def test_a_run_is_better_than_chance_and_resumes_bit_by_bit(tmp_path: Path) -> None:
    from jepa.objectives.classify import Classification
    from jepa.runs.checkpoint import find, load_model

    options = [*SHAPES, "steps=40", "save_every=20", "eval_every=100", "lr=6e-3"]
    options += ["objective.mixup=0.2", "objective.momentum=0.8"]
    options += ["dataset.num_samples=64", "objective.layer_decay=1.0", "objective.label_smoothing=0.0"]
    metrics = JEPAAgent(JEPAConfig(*options), folder=tmp_path / "whole").train()
    assert metrics["probe/classifier_top1"] > 16, "chance is 10, with a standard error of 2"
    assert metrics["probe/classifier_top5"] > metrics["probe/classifier_top1"]

    class Cut(RuntimeError):
        pass

    after = Classification.after_step

    def cut(self: Classification, step: int) -> dict[str, float]:
        if step == 24:
            raise Cut
        return after(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classification, "after_step", cut)
        with pytest.raises(Cut):
            JEPAAgent(JEPAConfig(*options), folder=tmp_path / "cut").train()
    JEPAAgent(JEPAConfig(*options), folder=tmp_path / "cut").train()
    whole, resumed = (load_model(find(tmp_path / name)) for name in ("whole", "cut"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_the_command_goes_on_from_a_run_with_its_sizes(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["jepa-finetune"])
    own = [text for text in PLAIN if not text.startswith(("encoder", "image_size", "evaluator"))]
    assert main([f"run={pretrained}", *own, "steps=2", "name=tuned"]) == 0
    rows = read_rows(tmp_path / "outputs" / "tuned")
    assert [row["step"] for row in rows if "probe/classifier_top1" in row] == [0, 1, 2]
    assert "loaded encoder, untrained head" in capsys.readouterr().out
    tuned = JEPAAgent(JEPAConfig(*SHAPES), folder=tmp_path / "outputs" / "tuned").encoder
    assert tuned.clip_shape == (3, 1, 32, 32)


def test_sizes_are_those_of_the_weights_unless_given(pretrained: Path) -> None:
    weights = f"encoder.weights={pretrained}"
    data = "dataset=shapes"
    assert to_train_arguments([f"run={pretrained}", data]) == [weights, data, "image_size=[32,32]", "num_frames=1"]
    assert to_train_arguments([weights, data, "image_size=64"]) == [weights, data, "image_size=64", "num_frames=1"]
    assert to_train_arguments(["run=timm:vit"]) == ["encoder.weights=timm:vit"]
    assert to_train_arguments([f"run={pretrained},{pretrained}", data])[2:] == ["image_size=[32,32]", "num_frames=1"]
    with pytest.raises(ConfigError, match="the input sizes differ"):
        to_train_arguments([f"run={pretrained},timm:vit"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "run: the weights to start from are missing"),
        (["run=PLACE", "objective.momentm=1"], 'did you mean "objective.momentum"?'),
        (["run=PLACE", "mask=random"], "objective=classify uses no mask"),
        (["run=/no/such/run"], "does not exist"),
        (["run=PLACE", "encoder.depth=2"], "encoder.depth=2"),
    ],
)
def test_a_wrong_command_is_refused_before_torch(
    pretrained: Path,
    arguments: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["/venv/bin/jepa-finetune"])
    assert main([text.replace("PLACE", str(pretrained)) for text in arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("jepa-finetune: ")
    assert expected in errors


def test_labels_that_are_learnt_are_never_judged_on(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(8):
        path = tmp_path / "data" / "train" / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, 0, 0)).save(path)
    files = ["dataset=imagefolder", f"dataset.root_path={tmp_path / 'data'}", "batch_size=4", "steps=1"]
    options = [*(text for text in SHAPES if not text.startswith("dataset")), *files]
    with pytest.raises(ConfigError, match=r"no held-out part; name one, as with dataset\.val_folder"):
        JEPAAgent(JEPAConfig(*options), folder=tmp_path / "run").train()


class Labelled:
    """A data set of which nothing but its labels is asked."""

    classes = CLASSES

    def __init__(self, labels: Sequence[int], held_out: Labelled | None = None) -> None:
        self.labels = np.array(labels)
        self.validation = lambda: held_out

    def __len__(self) -> int:
        return len(self.labels)


def test_classes_that_a_part_lacks_are_named(caplog: pytest.LogCaptureFixture) -> None:
    check_labels(Labelled([0, 1, 2, 3, -1], Labelled([0, 0, 3])))  # pyright: ignore[reportArgumentType]
    check_labels(Labelled([0, 1, 3], Labelled([0, 1, 2, 3])))  # pyright: ignore[reportArgumentType]
    assert caplog.messages == ["no held-out sample is of bee, cat", "no training sample is of cat"]


@pytest.mark.parametrize(("train", "held_out", "part"), [([-1, -1], [0], "training"), ([0, 1], [-1, -1], "held-out")])
def test_a_part_without_labels_is_refused(train: list[int], held_out: list[int], part: str) -> None:
    with pytest.raises(ValueError, match=f"none of the 2 {part} samples has one"):
        check_labels(Labelled(train, Labelled(held_out)))  # pyright: ignore[reportArgumentType]


def test_what_fine_tuning_needs_can_be_estimated(pretrained: Path) -> None:
    weights = ["encoder=pretrained", f"encoder.weights={pretrained}", "objective.freeze=true"]
    config = compose([*(text for text in SHAPES if not text.startswith("encoder")), *weights])
    needs = model_cost(config, make_dataset(config), 4, bf16=False)
    assert needs.trained == 2 * 32 + 33 * 10, "norm and head"
    assert needs.frozen == needs.encoder
