"""jepa-eval: judges representations by one protocol on one data set, floors beside them, and keeps what is done."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jepa.benchmark.cache import FORMAT, FeatureCache
from jepa.benchmark.features import Encoded, Floor, Frozen, Pictures, tuning_of
from jepa.benchmark.inspect import Subject
from jepa.benchmark.inspect_page import write_page
from jepa.benchmark.reading import Part, Parts, split
from jepa.benchmark.report import write
from jepa.benchmark.results import Results, Row, Trial, summary, trial
from jepa.config import EvalConfig, build, factory, refusals
from jepa.config.command_rules import FLOORS, OF_VECTORS, as_list, evaluator_of
from jepa.config.view import pair_of
from jepa.data.transforms import EvalTransform
from jepa.encoders.pretrained import open_encoder
from jepa.errors import ConfigError
from jepa.evaluation.finetune import FineTuning
from jepa.evaluation.linear import LinearProbe
from jepa.evaluation.probe import Answer, ClassProbe, ProbeTask, select
from jepa.evaluation.samples import thumbnails
from jepa.evaluation.types import Features
from jepa.parallel.session import Session, open_session
from jepa.runs.metrics import versions
from jepa.seeding import derive_seed, generator

TITLES = {"knn": "kNN", "finetune": "fine-tuned", "linear_sgd": "linear SGD"}
METRIC = "metric: top-1 accuracy on the test samples, which choose nothing; the weights after the last epoch count"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """What is judged."""

    title: str
    run: str
    """that the encoder is of"""
    word: str = ""
    """of a floor"""

    def offers(self, task: str) -> bool:
        return task in OF_VECTORS or (self.word in ("", "untrained") and (task != "inspect" or not self.word))


def evaluate(config: EvalConfig) -> Path:
    """Judge, print the table and return the results' folder, outputs/NAME; what it holds already is not repeated.

    Raises ConfigError for what only the data and the encoders can tell, RunError where nothing can be read.
    """
    with refusals():
        bench = Bench(config)
        results = Results.open(Path("outputs") / config.name, bench.facts())
    bench.cache.folder = results.folder / "features" if config.cache else None
    for source in bench.sources:
        for task in as_list(config.task):
            if source.offers(task):
                bench.judge(source, task, results)
        bench.close()
    if results.rows:
        print(f"\n{write(results)}\nreport: {results.folder / 'eval.html'}", flush=True)
    return results.folder


class Bench:
    """The data and the settings of a protocol; opens one source at a time."""

    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        self.session: Session = open_session(device=config.device, precision=config.precision)
        self.parts: Parts = split(
            build(config.dataset, num_frames=config.num_frames),
            train_samples=config.train_samples, test_samples=config.test_samples, seed=config.seed,
            num_workers=config.num_workers,
        )  # fmt: skip
        self.cache = FeatureCache(None, config.batch_size)
        self.sources = list(_sources(config))
        self._opened: dict[tuple[Source, int], Any] = {}
        for source in self.sources:
            if not source.word:
                self._check(source.title, self._encoder(source.run, False, config.seed))

    def facts(self) -> dict[str, Any]:
        train, test = self.parts.train, self.parts.test
        return {
            "warnings": list(self.parts.warnings), "classes": list(self.parts.classes),
            "test": test.digest, "num_train": len(train.labels), "num_test": len(test.labels),
            "config": asdict(self.config), "versions": versions(), "device": str(self.session.device),
            "precision": "bf16" if self.session.bf16 else "fp32",
        }  # fmt: skip

    def judge(self, source: Source, task: str, results: Results) -> None:
        """A row, unless it is there already."""
        if task == "inspect":
            representation = self.open(source, self.config.seed)
            assert isinstance(representation, Frozen)
            several = sum(not source.word for source in self.sources) > 1
            folder = results.folder / source.title.replace("/", "-") if several else results.folder
            print(f"inspection: {inspect(folder, source.title, representation, self.parts, self.cache)}", flush=True)
            return
        name = evaluator_of(task, self.config.solver)
        assert name is not None
        probe: ClassProbe = factory(self.config.evaluator[name])()
        column = ", ".join([TITLES.get(name, name), *self._distinctions(task)])
        seeds = self._seeds(source, task)
        settings = self._settings(source, name, seeds)
        key = hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()[:24]
        if results.has(source.title, column, key):
            return
        begun, self.cache.seconds = time.perf_counter(), 0.0
        trials, notes, num_test = [], [], 0
        for seed in seeds:
            found, num_test, note = self._trial(source, probe, seed)
            trials.append(found)
            notes += [note] if note else []
        encoding = self.cache.seconds
        seconds = {"encoding": encoding, "probe": time.perf_counter() - begun - encoding}
        row = Row(
            title=source.title, column=column, key=key, run=source.run, settings=settings, seconds=seconds,
            protocol=[f"data: {self.parts.told}", *self._protocol(source, task, probe, seeds), *dict.fromkeys(notes)],
            **summary(trials, num_test),
        )  # fmt: skip
        results.add(row)
        shown = f"{row.top1:.1f} % ({row.low:.1f}-{row.high:.1f})"
        log.info("%s, %s: %s, %.1f s", row.title, row.column, shown, sum(seconds.values()))

    def open(self, source: Source, seed: int) -> Floor | Frozen:
        """The representation; with fresh weights it depends on the seed."""
        seed = seed if source.word == "untrained" else self.config.seed
        if (source, seed) not in self._opened:
            if source.word in ("pixels", "hog"):
                self._opened[source, seed] = Floor(source.word, self._transform_of_floors())
            else:
                self._opened[source, seed] = Frozen(
                    encoder=self._encoder(source.run, source.word == "untrained", seed),
                    pooling=self.config.pooling, layers=self.config.layers, session=self.session,
                )  # fmt: skip
        return self._opened[source, seed]

    def close(self) -> None:
        """What is held in memory for the last source."""
        self._opened.clear()
        self.cache.forget()

    def _encoder(self, run: str, fresh: bool, seed: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, 0, 0, "init"))
            encoder: Any = open_encoder(run, fresh=fresh)
            size = pair_of(self.config.image_size)
            if size and size != tuple(encoder.clip_shape[2:]):
                torch.manual_seed(derive_seed(seed, 0, 0, "init"))
                encoder = open_encoder(run, clip_shape=(*encoder.clip_shape[:2], *size), fresh=fresh)
        return encoder.eval()

    def _transform_of_floors(self) -> EvalTransform:
        """Pictures of the size that the first encoder sees."""
        size = pair_of(self.config.image_size)
        if size is None:
            first = next(source for source in self.sources if source.run)
            size = tuple(self._encoder(first.run, False, self.config.seed).transform.image_size)
        channels = self.parts.train.dataset.channels
        return EvalTransform(image_size=size, mean=[0.0] * channels, std=[1.0] * channels)

    def _check(self, title: str, encoder: Any) -> None:
        channels, frames, height, width = encoder.clip_shape
        own = self.parts.train.dataset.channels
        if own != channels:
            raise ConfigError(
                [f"dataset.channels: {title} reads {channels} channels, the pictures have {own}; give a data set with "
                 f"as many, as dataset.channels={channels} where it has that key"]
            )  # fmt: skip
        if self.config.num_frames != frames:
            try:
                encoder.grid_of(torch.empty(1, channels, self.config.num_frames, height, width, device="meta"))
            except ValueError as error:
                raise ConfigError([f"num_frames={self.config.num_frames}: {title} cannot read it: {error}"]) from error

    def _distinctions(self, task: str) -> Iterator[str]:
        """What sets the protocol of a column apart from the usual one."""
        config = self.config
        if config.shots:
            yield f"{config.shots:g} per class" if config.shots >= 1 else f"{100 * config.shots:g} %"
        if config.train_samples:
            yield f"of {config.train_samples:,}"
        if config.image_size:
            yield f"{config.image_size} px"
        if task != "finetune" and config.layers > 1:
            yield f"{config.layers} layers"
        if task in OF_VECTORS and config.pooling != "mean":
            yield config.pooling

    def _seeds(self, source: Source, task: str) -> list[int]:
        """Several where anything is random."""
        config = self.config
        random = task in ("attentive", "finetune") or (task == "linear" and config.solver == "sgd")
        several = random or config.shots is not None or source.word == "untrained"
        return [config.seed + number for number in range(config.seeds if several else 1)]

    def _settings(self, source: Source, name: str, seeds: Sequence[int]) -> dict[str, Any]:
        """All that determines the numbers of a row."""
        config, representation = self.config, self.open(source, seeds[0])
        tuned = representation if name == "finetune" and isinstance(representation, Frozen) else None
        return {
            "format": FORMAT, "features": tuned.encoder_digest if tuned else representation.digest,
            "evaluator": config.evaluator[name], "train": self.parts.train.digest, "test": self.parts.test.digest,
            "shots": config.shots, "seeds": list(seeds), "num_frames": config.num_frames, "bf16": self.session.bf16,
            "augment": asdict(config.augment) if tuned else None,
            "pooling": config.pooling, "layers": config.layers, "train_samples": config.train_samples,
        }  # fmt: skip

    def _trial(self, source: Source, probe: ClassProbe, seed: int) -> tuple[Trial, int, str]:
        """With the number of independent test samples, and what could not be read."""
        train, test, shots = self.parts.train, self.parts.test, self.config.shots
        if shots:
            train = train.take(few(train.labels, shots, seed, self.parts.classes))
        representation = self.open(source, seed)
        if isinstance(probe, FineTuning):
            assert isinstance(representation, Frozen)
            answer, rows, num_train = self._tune(representation, probe, train, test, seed)
            labels = test.labels[rows]
        else:
            tokens = getattr(probe, "needs_tokens", 0)
            title = source.title
            fitted, judged = (self.cache.features(title, representation, part, tokens) for part in (train, test))
            answer = probe.answer(self._task(fitted, judged, seed))
            labels, num_train = judged.labels, len(fitted.labels)
        unread = {"training": len(train.labels) - num_train, "test": len(test.labels) - len(labels)}
        note = ", ".join(f"{count:,} {name}" for name, count in unread.items() if count)
        found = trial(answer.predicted, labels, train.labels, len(self.parts.classes), seed, answer.chosen)
        return (
            found,
            min(test.num_sources, len(labels)),
            f"note: could not be read and left out: {note}" if note else "",
        )

    def _task(self, train: Features, test: Features, seed: int) -> ProbeTask:
        return ProbeTask(train, test, len(self.parts.classes), seed, self.session.device)

    def _tune(
        self, representation: Frozen, probe: FineTuning, train: Part, test: Part, seed: int
    ) -> tuple[Answer, torch.Tensor, int]:
        shown = [Pictures(part, representation, self.config.batch_size) for part in (train, test)]
        tuning = tuning_of(representation, shown[0], shown[1], self.config.augment, self.session, seed)
        empty = torch.empty(0, representation.encoder.embed_dim)
        task = self._task(Features(empty, train.labels), Features(empty, test.labels), seed)
        predicted = probe.tune(tuning, task)
        unread = sum(index in train.broken for index in train.indices)
        return Answer(predicted), shown[1].rows, len(train.indices) - unread

    def _protocol(self, source: Source, task: str, probe: ClassProbe, seeds: Sequence[int]) -> list[str]:
        representation, told = self.open(source, seeds[0]), []
        size = "x".join(map(str, representation.transform.image_size))
        frames = f", {self.config.num_frames} frames" if self.config.num_frames > 1 else ""
        shown = f"the central part resized to {size}{frames}, no augmentation"
        if isinstance(representation, Frozen) and representation.encoder.clip_shape[1] != self.config.num_frames:
            shown += f" (it was trained on {representation.encoder.clip_shape[1]} frames)"
        if task == "attentive":
            which = "" if self.config.layers == 1 else f" of the last {self.config.layers} blocks, side by side"
            told.append(f"features of the attentive probe: the encoder's tokens{which} in eval mode; {shown}")
        elif task != "finetune":
            told.append(f"features: {representation.told}; {shown}")
        told.append(f"probe: {probe.method}")
        if task == "finetune":
            crop = self.config.augment
            told.append(
                f"crops: scale {crop.crop_scale}, aspect {crop.crop_aspect}, flip {crop.flip}; tested on {shown}"
            )
        if self.config.shots:
            shots = self.config.shots
            each = f"{shots:g} training samples" if shots >= 1 else f"{100 * shots:g} % of the training samples"
            told.append(f"few-shot: of each class {each}, drawn anew for each seed")
        seeded = f"seeds {seeds[0]} to {seeds[-1]}: the mean counts" if len(seeds) > 1 else f"seed {seeds[0]}"
        return [*told, METRIC, seeded]


def _sources(config: EvalConfig) -> Iterator[Source]:
    """Floors first, then the runs in their order."""
    runs = [run for run in as_list(config.run) if run not in FLOORS]
    asked = [word for word in FLOORS if word in config.floors or word in as_list(config.run)]
    for word in asked:
        if word == "hog" and find_spec("skimage") is None:
            log.warning("hog is left out: it needs scikit-image, pip install 'jepa-train[eval]'")
        elif runs or word != "untrained":
            yield Source(word, runs[0] if runs else "", word)
    titles = [_title(run) for run in runs]
    for run, title in zip(runs, titles, strict=True):
        yield Source(title if titles.count(title) == 1 else run, run)


def _title(run: str) -> str:
    """The name of a run, of other sources as they are written."""
    if ":" in run:
        return run
    return run.rstrip("/").rpartition("outputs/")[2].removesuffix("/checkpoints/last") or run


NUM_PICTURES = 32


@dataclass(frozen=True)
class Thumbnails:
    """Small pictures instead of vectors, so that they are read as features are."""

    transform: EvalTransform
    digest = "thumbnails"

    def reduce(self, clips: Sequence[Tensor]) -> Tensor:
        return thumbnails(self.transform.pictures(clips))

    def encode(self, values: Tensor, max_tokens: int) -> Encoded:
        return Encoded(values)


def inspect(folder: Path, title: str, representation: Frozen, parts: Parts, cache: FeatureCache) -> Path:
    """Write FOLDER/inspect.html; test samples are shown in a random order, always the same."""
    train, test = (cache.features(title, representation, part) for part in (parts.train, parts.test))
    small = FeatureCache(None, cache.batch_size)
    shown = [small.features("pictures", Thumbnails(representation.transform), part) for part in parts[:2]]
    probe = LinearProbe()
    answer = probe.answer(ProbeTask(train, test, len(parts.classes), device=representation.session.device))
    assert answer.probabilities is not None
    order = torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(0))
    readable = torch.tensor([row for row, index in enumerate(parts.test.indices) if index not in parts.test.broken])
    first = parts.test.take(readable[order[:NUM_PICTURES]])
    pictures = torch.cat([chunk.values for chunk in first.read(representation.reduce, NUM_PICTURES)])
    folder.mkdir(parents=True, exist_ok=True)
    subject = Subject(
        title=title, encoder=representation.encoder, train=train, test=select(test, order), pictures=pictures,
        train_thumbnails=shown[0].vectors, test_thumbnails=shown[1].vectors[order], classes=parts.classes,
        probabilities=answer.probabilities[order],
        protocol=(f"data: {parts.told}", f"features: {representation.told}", f"probe: {probe.method}"),
    )  # fmt: skip
    return write_page(folder, subject)


def few(labels: Tensor, shots: float, seed: int, classes: Sequence[str]) -> Tensor:
    """[n] -> sorted rows: of each class `shots` samples, or below 1 that share of them (one at least).

    With one seed a smaller split is part of every larger one. Raises ConfigError where a class has too few.
    """
    rank = torch.rand(len(labels), generator=generator(seed, 0, 0, "shots"))
    chosen = []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0]
        count = int(shots) if shots >= 1 else max(1, round(shots * len(rows)))
        if count > len(rows):
            raise ConfigError(
                [f'shots={shots:g}: class "{classes[label]}" has only {len(rows)} training samples; lower shots']
            )
        chosen.append(rows[rank[rows].argsort()[:count]])
    return torch.cat(chosen).sort().values
