"""jepa-embed: features of files in one table, which a stopped command continues, and the neighbours of a picture."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from jepa.benchmark.protocol import check_input
from jepa.config import EmbedConfig, as_config_errors, build_with
from jepa.config.heads import file_settings, stored_config
from jepa.data.folders import locked
from jepa.data.identity import digest_of_samples
from jepa.data.listing import account
from jepa.data.loader import UNREADABLE, choose_num_workers, first_line
from jepa.encoders.pretrained import open_encoder
from jepa.errors import ConfigError, RunError
from jepa.evaluation.frozen import FrozenEncoder
from jepa.evaluation.probe import nearest
from jepa.evaluation.samples import Samples, Split
from jepa.inference.feature_file import Batches, FeatureFile, read_features, write_features
from jepa.inference.files import all_files, is_video_file, names_of
from jepa.layers.attention import choose_attention
from jepa.parallel.session import open_session
from jepa.types import Dataset, DatasetTraits

log = logging.getLogger(__name__)
MAX_NAMED = 3
"""Number of unreadable files that the summary names; the file of features names all."""


class Neighbours(NamedTuple):
    """Files whose features are nearest to those of a picture, best first."""

    names: list[str]
    cosines: list[float]
    folder: str
    clip_shape: Sequence[int]


class Embedding:
    """An encoder with the settings of `jepa-embed`."""

    def __init__(self, config: EmbedConfig) -> None:
        self.config, self.target = config, Path(config.out).expanduser()
        session = open_session(device=config.device, precision=config.precision)
        with as_config_errors(f"run={config.run}: "):
            encoder: Any = open_encoder(config.run)
            self.settings = file_settings(stored_config(config.run))
        choose_attention(encoder, session.device, torch.bfloat16 if session.bf16 else torch.float32)
        self.clip_shape = encoder.clip_shape
        self.encoder = FrozenEncoder(
            encoder=encoder.to(session.device), transform=encoder.transform, session=session, layers=config.layers,
            readout="mean" if config.readout == "all" else config.readout,
        )  # fmt: skip

    def write(self) -> str:
        """Write the file of features, or what is missing of it; returns a summary."""
        dataset = self.dataset()
        folder, names = names_of(dataset)
        key = self._key(dataset, names)
        if self._is_complete(key):
            return f"{self.target} is complete"
        hidden = self.target.with_name(f".{self.target.name}.batches")
        with locked(hidden / "lock"):
            if self._is_complete(key):  # another process has written it in the meantime
                return f"{self.target} is complete"
            batches = Batches(hidden, f"{key} {self.config.batch_size}")
            broken = self._encode(dataset, batches)
            unreadable = {names[index]: reason for index, reason in sorted(broken.items())}
            indices, labels = batches.column("indices"), batches.column("labels")
            if not indices:
                first = next(iter(broken))
                raise RunError(f"no file can be read; the first: {dataset.describe(first)}: {broken[first]}")
            columns = {"name": [names[index] for index in indices]}
            if dataset.classes:
                columns["label"] = [dataset.classes[label] if label >= 0 else "" for label in labels]
            settings = {"run": self.config.run, "readout": self.config.readout, "layers": self.config.layers}
            facts = {**settings, "key": key, "encoder": self.encoder.digest, "folder": folder, "unreadable": unreadable}
            write_features(self.target, batches, columns, facts)
            batches.remove()
        return _summary(self.target, len(indices), unreadable)

    def dataset(self) -> Dataset:
        config = self.config
        with as_config_errors():
            if config.dataset:
                num_frames = config.num_frames or self.clip_shape[1]
                dataset = build_with(config.dataset, num_frames=num_frames)
                traits = DatasetTraits.of(dataset)
                dataset = (traits.probe_dataset if traits.parts else None) or dataset
                if config.part == "validation" and (dataset := dataset.validation()) is None:
                    raise ConfigError(["part=validation: the data set has no held-out part"])
            else:
                given = config.videos or config.images
                assert given is not None  # the rules of the configuration
                dataset = self._files(given, is_video=config.videos is not None)
        check_input(config.run, self.encoder.encoder, dataset.channels, DatasetTraits.of(dataset).num_frames)
        return dataset

    def neighbours(self, picture: str) -> Neighbours:
        """The nearest files in the file of features. Raises RunError if another encoder has made it."""
        content = self._searched()
        with as_config_errors():
            dataset = self._files(picture, is_video=is_video_file(picture))
            check_input(self.config.run, self.encoder.encoder, dataset.channels, DatasetTraits.of(dataset).num_frames)
        try:
            encoded = self.encoder.encode(self.encoder.reduce([dataset[0][0]]))
        except UNREADABLE as error:
            raise RunError(f"like={picture}: {first_line(error)}") from error
        bank = torch.from_numpy(np.require(content.features, requirements="W"))
        indices, cosines = nearest(encoded.vectors, bank, self.config.neighbours)
        names = [content.names[index] for index in indices[0].tolist()]
        return Neighbours(names, cosines[0].tolist(), content.facts["folder"], self.clip_shape)

    def _files(self, given: str, *, is_video: bool) -> Any:
        shape, frames = self.clip_shape, self.config.num_frames
        return all_files(given, is_video=is_video, clip_shape=shape, settings=self.settings, num_frames=frames)

    def _searched(self) -> FeatureFile:
        content = read_features(self.target)
        if content.facts["encoder"] != self.encoder.digest or content.facts["readout"] != self.config.readout:
            made = f"run={content.facts['run']} readout={content.facts['readout']} layers={content.facts['layers']}"
            raise RunError(f"{self.target} was made with {made}, or its weights have changed since; give that run")
        return content

    def _key(self, dataset: Dataset, names: Sequence[str]) -> str:
        """Hash of everything that the file depends on: encoder, settings, names, sizes and times of the files."""
        indices, traits = range(len(dataset)), DatasetTraits.of(dataset)
        frames = traits.num_frames, self.settings
        content = [digest_of_samples(dataset, indices), *(traits.modified(index) for index in indices)]
        values = [self.encoder.digest, self.config.readout, frames, list(names), content]
        return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:24]

    def _is_complete(self, key: str) -> bool:
        """Raises RunError if the file holds something else."""
        if not self.target.exists():
            return False
        if read_features(self.target, with_features=False).facts["key"] != key:
            raise RunError(
                f"{self.target} holds features of other files, or of another encoder or readout; "
                "remove it, or give another out="
            )
        return True

    def _encode(self, dataset: Dataset, batches: Batches) -> dict[int, str]:
        """Add the missing batches; returns the index and the reason of each file that cannot be read."""
        workers = choose_num_workers(dataset) if self.config.num_workers is None else self.config.num_workers
        size = max(1, self.config.batch_size // DatasetTraits.of(dataset).num_frames)
        done = set(batches.numbers())
        missing = tuple(index for index in range(len(dataset)) if index // size not in done)
        notes = (json.loads(str(batches.read(number, "unreadable"))) for number in sorted(done))
        broken = {int(index): reason for note in notes for index, reason in note.items()}
        if done:
            log.info("%s goes on with %d of %d files", self.target, len(missing), len(dataset))
        split = Split(dataset=dataset, name="files", indices=missing, num_workers=workers, broken=broken)
        samples = Samples(
            split=split, reduce=self.encoder.reduce, batch_size=self.config.batch_size, title="embedding",
            may_be_empty=True,
        )  # fmt: skip
        for batch in samples.batches() if missing else ():
            indices = np.array([missing[row] for row in batch.rows.tolist()])
            number = int(indices[0]) // size
            unreadable = {index: reason for index, reason in broken.items() if index // size == number}
            batches.add(
                number, features=self._features(batch.values), indices=indices, labels=batch.labels.numpy(),
                unreadable=np.array(json.dumps(unreadable)),
            )  # fmt: skip
        return broken

    def _features(self, pictures: torch.Tensor) -> np.ndarray:
        """uint8 [b, C, T, H, W] -> float32 [b, D], or all tokens, float16 [b, N, D]"""
        if self.config.readout != "all":
            return self.encoder.encode(pictures).vectors.numpy()
        num_tokens = self.encoder.encoder.grid_of(pictures).num_tokens
        tokens = self.encoder.encode(pictures, num_tokens).tokens
        assert tokens is not None
        return tokens.numpy()


def _summary(target: Path, num_rows: int, unreadable: dict[str, str]) -> str:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in list(unreadable.items())[:MAX_NAMED])
    more = f" and {len(unreadable) - MAX_NAMED} more" if len(unreadable) > MAX_NAMED else ""
    size = f"{target.stat().st_size / 1e6:.1f} MB"
    left_out = Counter({f"that cannot be read ({reasons}{more})": len(unreadable)})
    return account(f"{target}: {num_rows:,} rows, {size}", left_out)
