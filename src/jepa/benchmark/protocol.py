"""jepa-eval: evaluates representations and baselines by one protocol on one data set, and stores the results."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jepa.benchmark.features import FORMAT, Baseline, DictionaryCells, FeatureCache
from jepa.benchmark.inspect import Subject
from jepa.benchmark.inspect_page import write_page
from jepa.benchmark.report import write
from jepa.benchmark.results import Results, Row, Trial, summary, trial
from jepa.config import EvalConfig, as_config_errors, build_with, factory
from jepa.config.command_rules import BASELINES, VECTOR_TASKS, as_list, evaluator_of
from jepa.config.run_data import describe_data
from jepa.config.view import pair_of
from jepa.data.transforms import Augment, EvalTransform
from jepa.encoders.pretrained import open_encoder
from jepa.errors import ConfigError
from jepa.evaluation.finetune import FineTuning
from jepa.evaluation.frozen import FrozenEncoder, Tuning
from jepa.evaluation.linear import LinearProbe
from jepa.evaluation.probe import ClassProbe, ProbePrediction, ProbeTask, select
from jepa.evaluation.samples import Reduce, Samples, thumbnails
from jepa.evaluation.splits import LabelledSplit, few_shot_rows, labelled_splits
from jepa.evaluation.stems import fit_stems
from jepa.evaluation.types import EvaluatorTraits, Features
from jepa.layers.attention import choose_attention
from jepa.layers.dictionary import CELL
from jepa.parallel.session import Session, open_session
from jepa.runs.metrics import versions
from jepa.seeding import derive_seed

NUM_PICTURES = 32
"""Number of test samples in an inspection."""
MAX_CACHED_BYTES = 1 << 31
"""Size in bytes up to which fine-tuning caches the pictures of a split; larger splits are read in each epoch."""
TITLES = {"knn": "kNN", "finetune": "fine-tuned", "linear_sgd": "linear SGD"}
METRIC = "metric: top-1 accuracy on the test samples, which select nothing; weights are those after the last epoch"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """An encoder or a baseline to evaluate."""

    title: str
    run: str
    """run, export or checkpoint of the encoder"""
    baseline: str = ""
    """name of the baseline; empty for a trained encoder"""

    def supports(self, task: str) -> bool:
        return task in VECTOR_TASKS or not self.baseline or (self.baseline == "untrained" and task != "inspect")


def evaluate(config: EvalConfig) -> Path:
    """Evaluate, print the table and return outputs/NAME, the folder of the results; rows in it are not repeated.

    Raises ConfigError for errors that only the data and the encoders reveal, RunError if nothing can be read.
    """
    with as_config_errors():
        benchmark = Benchmark(config)
        results = Results.open(Path("outputs") / config.name, benchmark.facts())
    print(benchmark.data, flush=True)
    results.folder.mkdir(parents=True, exist_ok=True)  # raises before the evaluation where nothing can be written
    benchmark.cache.folder = results.folder / "features" if config.cache else None
    for entry in benchmark.entries:
        for task in as_list(config.task):
            if entry.supports(task):
                benchmark.evaluate(entry, task, results)
        benchmark.close()
    if results.rows:
        print(f"\n{write(results)}\nreport: {results.folder / 'eval.html'}", flush=True)
    return results.folder


class Benchmark:
    """The data, settings and representations of an evaluation."""

    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        self.session: Session = open_session(device=config.device, precision=config.precision)
        self.splits = labelled_splits(
            build_with(config.dataset, num_frames=config.num_frames),
            train_samples=config.train_samples, test_samples=config.test_samples, seed=config.seed,
            num_workers=config.num_workers,
        )  # fmt: skip
        self.cache = FeatureCache(None, config.batch_size)
        self.entries = list(_entries(config))
        self._opened: dict[tuple[Entry, int, str], Baseline | FrozenEncoder] = {}
        for entry in self.entries:
            if not entry.baseline:
                self._check(entry.title, self._encoder(entry.run, False, config.seed))
        self._check_dictionary()

    @property
    def data(self) -> str:
        """The line that names the data: what is read, and how much of it."""
        train, test, classes = len(self.splits.train.labels), len(self.splits.test.labels), len(self.splits.classes)
        what = describe_data(self.config.dataset)
        return f"data: {what}, {train:,} training and {test:,} test samples in {classes} classes"

    def facts(self) -> dict[str, Any]:
        train, test = self.splits.train, self.splits.test
        return {
            "data": self.data, "warnings": list(self.splits.warnings), "classes": list(self.splits.classes),
            "test": test.digest, "test_files": test.files, "num_train": len(train.labels), "num_test": len(test.labels),
            "config": asdict(self.config), "versions": versions(), "device": str(self.session.device),
            "precision": "bf16" if self.session.bf16 else "fp32",
        }  # fmt: skip

    def evaluate(self, entry: Entry, task: str, results: Results) -> None:
        """Add the row to the results, unless they have it already."""
        if task == "inspect":
            self._inspect(entry, results.folder)
            return
        name = evaluator_of(task, self.config.solver)
        assert name is not None
        probe: ClassProbe = factory(self._node(name))()
        column = ", ".join([TITLES.get(name, name), *self._distinctions(task, probe.readout)])
        seeds = self._seeds(entry, task)
        settings = self._settings(entry, name, probe.readout, seeds)
        key = hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()[:24]
        stored = results.rows.get((entry.title, column))
        if stored and stored.key == key:
            return
        start, self.cache.seconds = time.perf_counter(), 0.0
        trials, nums_test, notes = zip(*(self._trial(entry, probe, seed) for seed in seeds), strict=True)
        encoding = self.cache.seconds
        seconds = {"encoding": encoding, "probe": time.perf_counter() - start - encoding}
        row = Row(
            title=entry.title, column=column, key=key, run=entry.run, settings=settings, seconds=seconds,
            protocol=[*self._protocol(entry, task, probe, seeds), *dict.fromkeys(filter(None, notes))],
            **summary(trials, nums_test[-1]),
        )  # fmt: skip
        results.add(row)
        accuracy = f"{row.top1:.1f} % ({row.low:.1f}-{row.high:.1f})"
        log.info("%s, %s: %s, %.1f s", row.title, row.column, accuracy, sum(seconds.values()))

    def _node(self, evaluator: str) -> dict[str, Any]:
        """The evaluator's node, with the readout of this evaluation if that is given."""
        node = self.config.evaluator[evaluator]
        return node | {"readout": self.config.readout} if self.config.readout and "readout" in node else node

    def _inspect(self, entry: Entry, folder: Path) -> None:
        """Write inspect.html; test samples come in a random order that is always the same."""
        encoder, (train_split, test_split, *_) = self.open(entry, self.config.seed), self.splits
        assert isinstance(encoder, FrozenEncoder)
        train, test = (self.cache.features(entry.title, encoder, split) for split in (train_split, test_split))
        thumbnail = partial(_thumbnails, encoder.transform)
        train_thumbnails, test_thumbnails = (
            self._read(split, thumbnail, "encoding pictures") for split in (train_split, test_split)
        )
        probe = LinearProbe()
        prediction = probe.predict(ProbeTask(train, test, len(self.splits.classes), device=self.session.device))
        assert prediction.probabilities is not None
        order = torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(0))
        readable = torch.tensor([row for row, i in enumerate(test_split.indices) if i not in test_split.broken])
        pictures = self._read(test_split.take(readable[order[:NUM_PICTURES]]), encoder.reduce)
        if sum(not other.baseline for other in self.entries) > 1:
            folder /= entry.title.replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        subject = Subject(
            title=entry.title, data=describe_data(self.config.dataset),
            encoder=encoder.encoder, train=train, test=select(test, order), pictures=pictures,
            train_thumbnails=train_thumbnails, test_thumbnails=test_thumbnails[order], classes=self.splits.classes,
            probabilities=prediction.probabilities[order],
            protocol=[f"data: {self.splits.description}", f"features: {encoder.description}", f"probe: {probe.method}"],
        )  # fmt: skip
        print(f"inspection: {write_page(folder, subject)}", flush=True)

    def _read(self, split: LabelledSplit, reduce: Reduce, title: str = "") -> Tensor:
        samples = Samples(split=split, reduce=reduce, batch_size=self.config.batch_size, title=title)
        return torch.cat([batch.values for batch in samples.batches()])

    def open(self, entry: Entry, seed: int, readout: str = "mean") -> Baseline | FrozenEncoder:
        """The representation of an entry; an untrained encoder depends on the seed."""
        seed = seed if entry.baseline in ("untrained", "dictionary") else self.config.seed
        key = (entry, seed, readout)
        if key not in self._opened:
            is_encoder = entry.baseline not in ("pixels", "hog")
            self._opened[key] = self._frozen(entry, seed, readout) if is_encoder else self._baseline(entry.baseline)
        return self._opened[key]

    def _frozen(self, entry: Entry, seed: int, readout: str) -> FrozenEncoder:
        encoder = self._dictionary(seed) if entry.baseline == "dictionary" else self._weights(entry, seed)
        choose_attention(encoder, self.session.device, torch.bfloat16 if self.session.bf16 else torch.float32)
        layers = 1 if entry.baseline == "dictionary" else self.config.layers
        return FrozenEncoder(
            encoder=encoder.to(self.session.device), transform=encoder.transform, session=self.session,
            readout=readout, layers=layers,
        )  # fmt: skip

    def _weights(self, entry: Entry, seed: int) -> Any:
        """The encoder of a run; of an untrained one only the dictionary, if it has one, is fitted, to the data here."""
        encoder = self._encoder(entry.run, entry.baseline == "untrained", seed)
        fit_stems(encoder, self.splits.train.dataset, encoder.transform, seed=seed)
        return encoder

    def _dictionary(self, seed: int) -> DictionaryCells:
        dataset = self.splits.train.dataset
        clip_shape = dataset.channels, self.config.num_frames, *self._baseline_size()
        encoder = DictionaryCells(clip_shape, mean=dataset.mean, std=dataset.std).eval()
        fit_stems(encoder, dataset, encoder.transform, seed=seed)
        return encoder

    def _baseline(self, name: str) -> Baseline:
        channels = self.splits.train.dataset.channels
        transform = EvalTransform(image_size=self._baseline_size(), mean=[0.0] * channels, std=[1.0] * channels)
        return Baseline(name, transform)

    def _baseline_size(self) -> tuple[int, int]:
        """Height and width of the pictures of a baseline: `image_size`, or else those of the first encoder."""
        size = pair_of(self.config.image_size)
        if size is None:
            first = next(entry for entry in self.entries if entry.run)
            size = self._encoder(first.run, False, self.config.seed).transform.image_size
        return size[0], size[1]

    def close(self) -> None:
        """Free the memory of the last entry."""
        self._opened.clear()
        self.cache.clear()

    def _encoder(self, run: str, fresh: bool, seed: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, 0, 0, "init"))
            encoder: Any = open_encoder(run, fresh=fresh)
            size = pair_of(self.config.image_size)
            if size and size != tuple(encoder.clip_shape[2:]):
                torch.manual_seed(derive_seed(seed, 0, 0, "init"))
                encoder = open_encoder(run, clip_shape=(*encoder.clip_shape[:2], *size), fresh=fresh)
        return encoder.eval()

    def _check(self, title: str, encoder: Any) -> None:
        check_input(title, encoder, self.splits.train.dataset.channels, self.config.num_frames)

    def _check_dictionary(self) -> None:
        """A dictionary that is only a floor is left out where no whole number of its cells fills a picture."""
        floors = [entry for entry in self.entries if entry.baseline == "dictionary"]
        size = self._baseline_size() if floors else (CELL, CELL)
        if not any(side % CELL for side in size):
            return
        reason = f"dictionary: its cells have {CELL} pixels a side and do not fill pictures of {size[0]} x {size[1]}"
        if "dictionary" in as_list(self.config.run):
            raise ConfigError([f"{reason}; give image_size={max(1, size[0] // CELL) * CELL}"])
        log.warning("%s; it is left out of the floors", reason)
        self.entries.remove(floors[0])

    def _distinctions(self, task: str, readout: str) -> Iterator[str]:
        """The settings of a column that differ from the default protocol."""
        config = self.config
        if config.shots:
            yield f"{config.shots:g} per class" if config.shots >= 1 else f"{100 * config.shots:g} %"
        if config.train_samples:
            yield f"of {config.train_samples:,}"
        if config.image_size:
            yield f"{config.image_size} px"
        if task != "finetune" and config.layers > 1:
            yield f"{config.layers} layers"
        if task in VECTOR_TASKS and readout != "mean":
            yield readout

    def _seeds(self, entry: Entry, task: str) -> list[int]:
        """Several seeds if a part of the evaluation is random, otherwise one."""
        config = self.config
        is_random = (
            task in ("attentive", "finetune") or (task == "linear" and config.solver == "sgd")
            or config.shots is not None or entry.baseline in ("untrained", "dictionary")
        )  # fmt: skip
        return [config.seed + number for number in range(config.seeds if is_random else 1)]

    def _settings(self, entry: Entry, name: str, readout: str, seeds: Sequence[int]) -> dict[str, Any]:
        """Everything that determines the numbers of a row."""
        config, representation = self.config, self.open(entry, seeds[0], readout)
        tuned = representation if name == "finetune" and isinstance(representation, FrozenEncoder) else None
        return {
            "format": FORMAT, "features": tuned.encoder_digest if tuned else representation.digest,
            "evaluator": self._node(name), "train": self.splits.train.version, "test": self.splits.test.version,
            "shots": config.shots, "seeds": list(seeds), "num_frames": config.num_frames, "bf16": self.session.bf16,
            "augment": asdict(config.augment) if tuned else None,
            "layers": config.layers, "train_samples": config.train_samples,
        }  # fmt: skip

    def _trial(self, entry: Entry, probe: ClassProbe, seed: int) -> tuple[Trial, int, str]:
        """The trial, the number of independent test samples, and a note on unreadable samples."""
        train, test, classes, *_ = self.splits
        if self.config.shots:
            train = train.take(few_shot_rows(train.labels, self.config.shots, seed, classes))
        representation = self.open(entry, seed, probe.readout)
        if isinstance(probe, FineTuning):
            assert isinstance(representation, FrozenEncoder)
            prediction, rows, num_train = self._tune(representation, probe, train, test, seed)
            labels = test.labels[rows]
        else:
            max_tokens = EvaluatorTraits.of(probe).needs_tokens
            train_features, test_features = (
                self.cache.features(entry.title, representation, split, max_tokens) for split in (train, test)
            )
            task = ProbeTask(train_features, test_features, len(classes), seed, self.session.device)
            prediction = probe.predict(task)
            labels, num_train = test_features.labels, len(train_features.labels)
        unread = {"training": len(train.labels) - num_train, "test": len(test.labels) - len(labels)}
        counts = ", ".join(f"{count:,} {name}" for name, count in unread.items() if count)
        note = f"note: could not be read and left out: {counts}" if counts else ""
        result = trial(prediction.predicted, labels, train.labels, len(classes), seed, prediction.chosen)
        return result, min(test.num_sources, len(labels)), note

    def _tune(
        self, encoder: FrozenEncoder, probe: FineTuning, train: LabelledSplit, test: LabelledSplit, seed: int
    ) -> tuple[ProbePrediction, Tensor, int]:
        """The prediction, the rows of readable test samples and the number of readable training samples."""
        options: dict[str, Any] = {"batch_size": self.config.batch_size, "max_bytes": MAX_CACHED_BYTES}
        train_samples, test_samples = (
            Samples(split=split, reduce=encoder.reduce, title="reading", **options) for split in (train, test)
        )
        normalise, crops = encoder.transform.normalise, asdict(self.config.augment)
        augment = Augment(image_size=encoder.transform.image_size, mean=normalise.mean, std=normalise.std, **crops)
        empty = torch.empty(0, encoder.encoder.embed_dim)
        task = ProbeTask(Features(empty, train.labels), Features(empty, test.labels), len(self.splits.classes))
        predicted = probe.tune(Tuning(encoder, train_samples, test_samples, augment, seed), task)
        num_train = sum(index not in train.broken for index in train.indices)
        return ProbePrediction(predicted), test_samples.rows, num_train

    def _protocol(self, entry: Entry, task: str, probe: ClassProbe, seeds: Sequence[int]) -> list[str]:
        """Sentences on the data, features, probe and seeds of a row."""
        config, representation = self.config, self.open(entry, seeds[0], probe.readout)
        size = "x".join(map(str, representation.transform.image_size))
        frames = f", {config.num_frames} frames" if config.num_frames > 1 else ""
        pictures = f"the central part resized to {size}{frames}, no augmentation"
        if isinstance(representation, FrozenEncoder) and representation.encoder.clip_shape[1] != config.num_frames:
            pictures += f" (it was trained on {representation.encoder.clip_shape[1]} frames)"
        lines = [f"data: {self.splits.description}"]
        if task == "attentive":
            blocks = "" if config.layers == 1 else f" of the last {config.layers} blocks, side by side"
            lines.append(f"features of the attentive probe: the encoder's tokens{blocks} in eval mode; {pictures}")
        elif task != "finetune":
            lines.append(f"features: {representation.description}; {pictures}")
        lines.append(f"probe: {probe.method}")
        if task == "finetune":
            crop = config.augment
            lines.append(
                f"crops: scale {crop.crop_scale}, aspect {crop.crop_aspect}, flip {crop.flip}; tested on {pictures}"
            )
        if shots := config.shots:
            amount = f"{shots:g} training samples" if shots >= 1 else f"{100 * shots:g} % of the training samples"
            lines.append(f"few-shot: {amount} of each class, drawn anew for each seed")
        mean = f"seeds {seeds[0]} to {seeds[-1]}: the result is their mean" if len(seeds) > 1 else f"seed {seeds[0]}"
        return [*lines, METRIC, mean]


def check_input(title: str, encoder: Any, channels: int, num_frames: int) -> None:
    """Raises ConfigError if the encoder cannot read clips of so many channels and frames."""
    expected, frames, height, width = encoder.clip_shape
    if channels != expected:
        raise ConfigError(
            [f"dataset.channels: {title} reads {expected} channels, the pictures have {channels}; give a data "
             f"set with as many, as dataset.channels={expected} where it has that key"]
        )  # fmt: skip
    if num_frames != frames:
        try:
            encoder.grid_of(torch.empty(1, channels, num_frames, height, width, device="meta"))
        except ValueError as error:
            raise ConfigError([f"num_frames={num_frames}: {title} cannot read it: {error}"]) from error


def _entries(config: EvalConfig) -> Iterator[Entry]:
    """Baselines first, then the runs in their order."""
    runs = [run for run in as_list(config.run) if run not in BASELINES]
    for baseline in BASELINES:
        if baseline not in config.floors and baseline not in as_list(config.run):
            continue
        if baseline == "hog" and find_spec("skimage") is None:
            log.warning("hog is left out: it needs scikit-image, pip install 'jepa-train[eval]'")
        elif runs or baseline != "untrained":
            yield Entry(baseline, runs[0] if runs else "", baseline)
    names = [run.rstrip("/").rpartition("outputs/")[2].removesuffix("/checkpoints/last") or run for run in runs]
    titles = [run if ":" in run else name for run, name in zip(runs, names, strict=True)]
    for run, title in zip(runs, titles, strict=True):
        yield Entry(title if titles.count(title) == 1 else run, run)


def _thumbnails(transform: EvalTransform, clips: Sequence[Tensor]) -> Tensor:
    return thumbnails(transform.pictures(clips))
