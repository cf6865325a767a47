"""The training step of facebookresearch/ijepa, run from a checkout of it, on the sizes of a configuration.

The checkout is imported, never copied (its licence is CC BY-NC 4.0). The order is that of its `train.py`: mask
collator, schedules, target encoder, context encoder, predictor, smooth-L1, backward, AdamW, gradient statistics,
momentum update, loss read on the host. Left out: DistributedDataParallel and, under bf16, the gradient scaler.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa.config import TrainConfig

WIDTHS = {192: "vit_tiny", 384: "vit_small", 768: "vit_base", 1024: "vit_large", 1280: "vit_huge"}
TOTAL_EPOCHS, STEPS_PER_EPOCH = 100, 1000
"""of the schedules; far more than is measured"""


class ReferenceStep:
    """One call is one training step on `images` [B, 3, H, W]; `bf16` runs its forward under autocast."""

    def __init__(self, checkout: Path, config: TrainConfig, images: Tensor) -> None:
        self.code = _import(checkout)
        self.images = images
        self.shape = {"context_tokens": 0, "target_tokens": 0}
        model = WIDTHS.get(config.encoder["embed_dim"])
        if model is None:
            raise ValueError(f"encoder.embed_dim={config.encoder['embed_dim']}: the reference has {list(WIDTHS)}")
        with _quiet():
            self.encoder, self.predictor = self.code.init_model(
                images.device,
                patch_size=config.encoder["patch_size"],
                model_name=model,
                crop_size=images.shape[-1],
                pred_depth=config.predictor["depth"],
                pred_emb_dim=config.predictor["width"],
            )
        self._check_size(config)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        with _quiet():
            self.optimizer, _, self.lr, self.weight_decay = self.code.init_opt(
                self.encoder, self.predictor, STEPS_PER_EPOCH, 1e-5, config.lr, 1, TOTAL_EPOCHS, wd=0.04, final_wd=0.4
            )
        self.collate = self._collator(config)

    def __call__(self, bf16: bool = False) -> float:
        batch = len(self.images)
        _, contexts, targets = self.collate([torch.zeros(1)] * batch)
        contexts, targets = ([m.to(self.images.device) for m in masks] for masks in (contexts, targets))
        self.shape = {"context_tokens": contexts[0].shape[1], "target_tokens": targets[0].shape[1]}
        self.lr.step()
        self.weight_decay.step()
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=bf16):
            hidden = self._targets(targets, batch)
            predicted = self.predictor(self.encoder(self.images, contexts), contexts, targets)
            loss = self.code.all_reduce(F.smooth_l1_loss(predicted, hidden))
        loss.backward()
        self.optimizer.step()
        self.code.grad_logger(self.encoder.named_parameters())
        self.optimizer.zero_grad()
        self._follow(momentum=0.996)
        return loss.item()

    @torch.no_grad()
    def _targets(self, targets: list[Tensor], batch: int) -> Tensor:
        hidden = self.target(self.images)
        hidden = self.code.apply_masks(F.layer_norm(hidden, hidden.shape[-1:]), targets)
        return self.code.repeat_interleave_batch(hidden, batch, repeat=1)

    @torch.no_grad()
    def _follow(self, momentum: float) -> None:
        """The momentum update with the temporary tensor that the reference makes for each parameter."""
        for source, target in zip(self.encoder.parameters(), self.target.parameters(), strict=True):
            target.mul_(momentum).add_((1.0 - momentum) * source)

    def _collator(self, config: TrainConfig) -> Callable[[list[Tensor]], tuple]:
        mask = config.mask
        return self.code.MaskCollator(
            input_size=tuple(self.images.shape[-2:]),
            patch_size=config.encoder["patch_size"],
            pred_mask_scale=tuple(mask["target_scale"]),
            enc_mask_scale=tuple(mask["context_scale"]),
            aspect_ratio=tuple(mask["target_aspect"]),
            nenc=1,
            npred=mask["num_targets"],
            min_keep=10,
        )

    def _check_size(self, config: TrainConfig) -> None:
        """Depth and heads are fixed by the reference's name of a model."""
        theirs = {"depth": len(self.encoder.blocks), "num_heads": self.encoder.blocks[0].attn.num_heads}
        ours = {name: config.encoder[name] for name in theirs}
        if ours != theirs:
            raise ValueError(f"the reference's encoder of width {self.encoder.embed_dim} has {theirs}, not {ours}")


def check_checkout(checkout: Path) -> None:
    if not (checkout / "src" / "masks" / "multiblock.py").is_file():
        raise ValueError(f"--reference {checkout}: expected a checkout of facebookresearch/ijepa, with src/masks in it")


def _import(checkout: Path) -> SimpleNamespace:
    """The names that the step needs, from the checkout's own package `src`."""
    check_checkout(checkout)
    sys.path.insert(0, str(checkout))
    with _quiet():
        from src.helper import init_model, init_opt  # pyright: ignore[reportMissingImports]
        from src.masks.multiblock import MaskCollator  # pyright: ignore[reportMissingImports]
        from src.masks.utils import apply_masks  # pyright: ignore[reportMissingImports]
        from src.utils.distributed import AllReduce  # pyright: ignore[reportMissingImports]
        from src.utils.logging import grad_logger  # pyright: ignore[reportMissingImports]
        from src.utils.tensors import repeat_interleave_batch  # pyright: ignore[reportMissingImports]
    names: dict[str, Any] = {
        "init_model": init_model,
        "init_opt": init_opt,
        "MaskCollator": MaskCollator,
        "apply_masks": apply_masks,
        "all_reduce": AllReduce.apply,
        "grad_logger": grad_logger,
        "repeat_interleave_batch": repeat_interleave_batch,
    }
    return SimpleNamespace(**names)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the reference's log lines, which it sends to stdout when it is imported."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        root.handlers[:] = handlers
        root.setLevel(level)
