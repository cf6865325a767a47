"""The training steps of facebookresearch/ijepa and /vjepa2, run from a checkout, on the sizes of a configuration.

A checkout is imported, never copied (the licence of ijepa is CC BY-NC 4.0). The order is that of its `train.py`: mask
collator, schedules, target encoder, context encoder, predictor, loss, backward, AdamW, gradient statistics where it has
them, momentum update, loss read on the host. Left out: DistributedDataParallel and, under bf16, the gradient scaler.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa.config import TrainConfig

WIDTHS = {192: "vit_tiny", 384: "vit_small", 768: "vit_base", 1024: "vit_large", 1280: "vit_huge"}
TOTAL_EPOCHS, STEPS_PER_EPOCH = 100, 1000
"""of the schedules; far more than is measured"""


class ReferenceStep(Protocol):
    """One call is one training step; `bf16` runs its forward under autocast."""

    tokens: dict[str, Any]
    """how many the last step had"""

    def __call__(self, bf16: bool = False) -> float: ...


class ImageStep:
    """The step of facebookresearch/ijepa on `clips` [B, 3, 1, H, W]."""

    MARK = "src/masks/multiblock.py"
    """what only this reference has"""
    SAME_TASK = ("mask.ratio=null", "objective.loss=smooth_l1")
    """what makes our step the reference's task"""
    SIZES = ("batch_size=8",)
    """of the published comparison; all else is the default of jepa-train"""
    IMPORTS = (
        *("src.helper.init_model", "src.helper.init_opt", "src.masks.multiblock.MaskCollator"),
        *("src.masks.utils.apply_masks", "src.utils.distributed.AllReduce", "src.utils.logging.grad_logger"),
        "src.utils.tensors.repeat_interleave_batch",
    )

    def __init__(self, checkout: Path, config: TrainConfig, clips: Tensor) -> None:
        self.code = _import(checkout, self.IMPORTS)
        self.images = clips.squeeze(2)
        self.tokens = {}
        with _quiet():
            self.encoder, self.predictor = self.code.init_model(
                self.images.device,
                patch_size=config.encoder["patch_size"],
                model_name=_model_name(config),
                crop_size=self.images.shape[-1],
                pred_depth=config.predictor["depth"],
                pred_emb_dim=config.predictor["width"],
            )
        _check_size(config, self.encoder)
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
        self.tokens = {"context_tokens": contexts[0].shape[1], "target_tokens": targets[0].shape[1]}
        self.lr.step()
        self.weight_decay.step()
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=bf16):
            hidden = self._targets(targets, batch)
            predicted = self.predictor(self.encoder(self.images, contexts), contexts, targets)
            loss = self.code.AllReduce.apply(F.smooth_l1_loss(predicted, hidden))
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


class ClipStep:
    """The step of facebookresearch/vjepa2 on `clips` [B, 3, T, H, W], with the published configuration's switches."""

    MARK = "src/masks/multiseq_multiblock3d.py"
    SAME_TASK = (
        *("encoder=temporal", "encoder.position=rope", "mask=multiblock3d", "objective.loss=l1"),
        *("predictor.position=rope", "predictor.depth=12", "predictor.num_heads=12"),
    )
    SIZES = ("dataset=moving_digits", "dataset.side=112", "image_size=112", "size=small", "batch_size=4")
    IMPORTS = (
        *("app.vjepa.utils.init_video_model", "app.vjepa.utils.init_opt", "src.masks.utils.apply_masks"),
        "src.masks.multiseq_multiblock3d.MaskCollator",
    )

    def __init__(self, checkout: Path, config: TrainConfig, clips: Tensor) -> None:
        self.code = _import(checkout, self.IMPORTS)
        self.clips = clips
        self.tokens = {}
        sizes = {"patch_size": config.encoder["patch_size"], "tubelet_size": config.encoder["tubelet_size"]}
        with _quiet():
            self.encoder, self.predictor = self.code.init_video_model(
                clips.device,
                max_num_frames=clips.shape[2],
                model_name=_model_name(config),
                crop_size=clips.shape[-1],
                pred_depth=config.predictor["depth"],
                pred_num_heads=config.predictor["num_heads"],
                pred_embed_dim=config.predictor["width"],
                uniform_power=True,
                use_mask_tokens=True,
                num_mask_tokens=len(config.mask["sets"]),
                use_sdpa=True,
                use_rope=config.encoder["position"] != "sincos",
                use_activation_checkpointing=config.encoder["checkpoint_activations"],
                **sizes,
            )
        _check_size(config, self.encoder.backbone)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        with _quiet():
            self.optimizer, _, self.lr, self.weight_decay = self.code.init_opt(
                is_anneal=False,
                encoder=self.encoder,
                predictor=self.predictor,
                iterations_per_epoch=STEPS_PER_EPOCH,
                start_lr=1e-5,
                ref_lr=config.lr,
                warmup=1,
                num_epochs=TOTAL_EPOCHS,
                wd=0.04,
                final_wd=0.04,
            )
        self.collate = self.code.MaskCollator(
            cfgs_mask=[values | {"aspect_ratio": values["aspect"]} for values in config.mask["sets"]],
            dataset_fpcs=[clips.shape[2]],
            crop_size=tuple(clips.shape[-2:]),
            **sizes,
        )

    def __call__(self, bf16: bool = False) -> float:
        sample = (torch.zeros(1), 0, [torch.arange(self.clips.shape[2])])
        ((_, contexts, targets),) = self.collate([sample] * len(self.clips))
        contexts, targets = ([m.to(self.clips.device) for m in masks] for masks in (contexts, targets))
        self.tokens = {
            "context_tokens": [m.shape[1] for m in contexts],
            "target_tokens": [m.shape[1] for m in targets],
        }
        self.lr.step()
        self.weight_decay.step()
        with torch.autocast(self.clips.device.type, torch.bfloat16, enabled=bf16):
            hidden = self._targets(targets)
            context = self.encoder([self.clips], [contexts])
            (predicted,) = self.predictor(context, [contexts], [targets])
            losses = [torch.mean(torch.abs(p - h)) for p, h in zip(predicted, hidden, strict=True)]
            loss = torch.stack(losses).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._follow(momentum=0.99925)
        return loss.item()

    @torch.no_grad()
    def _targets(self, targets: list[Tensor]) -> list[Tensor]:
        (hidden,) = self.target([self.clips])
        return self.code.apply_masks(F.layer_norm(hidden, hidden.shape[-1:]), targets, concat=False)

    @torch.no_grad()
    def _follow(self, momentum: float) -> None:
        sources, targets = list(self.encoder.parameters()), list(self.target.parameters())
        torch._foreach_mul_(targets, momentum)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(targets, sources, alpha=1 - momentum)  # pyright: ignore[reportPrivateImportUsage]


def find_reference(checkout: Path) -> type[ImageStep] | type[ClipStep]:
    """The name of the reference, recognised by its files; ValueError if it is none."""
    for step in (ClipStep, ImageStep):
        if (checkout / step.MARK).is_file():
            return step
    raise ValueError(
        f"--reference {checkout}: expected a checkout of facebookresearch/ijepa or facebookresearch/vjepa2, "
        "with src/masks in it"
    )


def _model_name(config: TrainConfig) -> str:
    width = config.encoder["embed_dim"]
    if width not in WIDTHS:
        raise ValueError(f"encoder.embed_dim={width}: the reference has {list(WIDTHS)}")
    return WIDTHS[width]


def _check_size(config: TrainConfig, encoder: Any) -> None:
    """Depth and heads are fixed by the reference's name of a model."""
    theirs = {"depth": len(encoder.blocks), "num_heads": encoder.blocks[0].attn.num_heads}
    ours = {name: config.encoder[name] for name in theirs}
    if ours != theirs:
        raise ValueError(f"the reference's encoder of width {encoder.embed_dim} has {theirs}, not {ours}")


def _import(checkout: Path, names: tuple[str, ...]) -> SimpleNamespace:
    """The names that the step needs, from the checkout's own packages."""
    sys.path.insert(0, str(checkout))
    with _quiet():
        split = [name.rpartition(".") for name in names]
        return SimpleNamespace(**{name: getattr(import_module(module), name) for module, _, name in split})


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
