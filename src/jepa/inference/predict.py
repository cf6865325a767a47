"""jepa-predict: a table of the classes or boxes that a fine-tuned run finds in files, and the pictures with them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from jepa.benchmark.protocol import check_input
from jepa.config import PredictConfig, as_config_errors
from jepa.config.heads import file_settings, stored_config
from jepa.data.loader import choose_num_workers
from jepa.evaluation.box_snapshot import IMAGES_PER_PICTURE
from jepa.evaluation.pictures import BLOCK_COLOURS, draw_boxes, label_tiles, resize_longest_side, to_rgb
from jepa.evaluation.samples import Samples, Split, progress
from jepa.inference.feature_file import replacing
from jepa.inference.files import all_files, names_of
from jepa.inference.finetuned import Finetuned, Prediction, load_finetuned
from jepa.layers.attention import choose_attention
from jepa.parallel.session import open_session
from jepa.runs.metrics import write_atomically

DRAWN_SIDE = 512
"""Longer side of a drawn picture in pixels."""


def predict(config: PredictConfig) -> str:
    """Write the table, and the pictures if asked for; returns a summary. Raises RunError if no file can be read."""
    session = open_session(device=config.device, precision=config.precision)
    model = load_finetuned(config.run).to(session.device)
    choose_attention(model, session.device, torch.bfloat16 if session.bf16 else torch.float32)
    given, is_video = config.videos or config.images, config.videos is not None
    assert given is not None  # the rules of the configuration
    with as_config_errors():
        settings = file_settings(stored_config(config.run))
        dataset: Any = all_files(given, is_video=is_video, clip_shape=model.clip_shape, settings=settings)
    frames = dataset.num_frames if is_video else 1
    check_input(config.run, model, dataset.channels, frames)
    _, names = names_of(dataset)
    target = Path(config.out).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    begun = target.with_name(f".{target.name}.begun")
    begun.touch()  # raises before the work where nothing can be written
    begun.unlink()
    workers = choose_num_workers(dataset) if config.num_workers is None else config.num_workers
    split = Split(dataset=dataset, name="given", indices=tuple(range(len(dataset))), num_workers=workers)
    size = config.batch_size // (IMAGES_PER_PICTURE if model.finds_boxes else 1)
    predictions: dict[int, list[Prediction]] = {}
    with progress(len(dataset), "predicting", "file") as advance:
        for batch in Samples(split=split, reduce=model.prepare, batch_size=size).batches():
            with session.autocast():
                found = model.predict_prepared(batch.values, top=config.top, min_score=config.min_score)
            predictions |= dict(zip(batch.rows.tolist(), found, strict=True))
            for row in batch.rows.tolist() if config.draw else ():
                _draw(Path(str(config.draw)).expanduser() / f"{names[row]}.png", dataset[row][0], predictions[row])
            advance(len(batch.rows))
    _write(target, model, names, predictions, split.broken, config.top)
    unread = f"; {len(split.broken):,} cannot be read, the column error says why" if split.broken else ""
    return f"{target}: {len(predictions):,} files{unread}"


def _write(
    path: Path, model: Finetuned, names: Sequence[str], predictions: dict[int, list[Prediction]],
    broken: dict[int, str], top: int,
) -> None:  # fmt: skip
    """One row for each file of a classifier; for each box of a detector, and for each file without one."""
    if model.finds_boxes:
        head, width = ["name", "class", "score", "left", "top", "right", "bottom"], 1
    else:
        width = min(top, len(model.classes))
        more = [f"{key}_{rank}" for rank in range(2, width + 1) for key in ("class", "probability")]
        head = ["name", "class", "probability", *more]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*head, "error"])
    for row in sorted(predictions.keys() | broken.keys()):
        cells = [[p.name, f"{p.score:.6g}", *(f"{edge:.2f}" for edge in p.box or ())] for p in predictions.get(row, ())]
        lines = cells if model.finds_boxes else [[value for cell in cells for value in cell]]
        for line in lines or [[]]:
            padding = [""] * (len(head) - 1 - len(line))
            table.writerow([names[row], *line, *padding, broken.get(row, "")])
    write_atomically(path, text.getvalue())


def _draw(path: Path, clip: Tensor, predictions: Sequence[Prediction]) -> None:
    """Write the picture [C, T, H, W], of a clip the middle frame, with its boxes or its classes."""
    picture, ratio = resize_longest_side(to_rgb(clip[None, :, clip.shape[1] // 2])[0], DRAWN_SIDE)
    texts = [f"{prediction.name} {prediction.score:.2f}" for prediction in predictions]
    boxes = [prediction.box for prediction in predictions if prediction.box]
    if boxes or not texts:
        names = sorted({prediction.name for prediction in predictions})
        colours = [BLOCK_COLOURS[names.index(one.name) % len(BLOCK_COLOURS)] for one in predictions]
        picture = draw_boxes(picture, ratio * torch.tensor(boxes).reshape(-1, 4), texts, colours)
    else:
        picture = label_tiles(picture[None], [", ".join(texts)], [(0, 0, 0)])[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
