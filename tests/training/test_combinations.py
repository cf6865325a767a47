"""Every encoder, mask, objective and regulariser of conf/ together: trained for two steps, or refused with a reason."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from jepa.config import Composer, to_dataclass
from jepa.config.catalogue import conf_folder
from jepa.parallel.session import open_session
from jepa.training.assemble import assemble, make_dataset, split_phases
from jepa.training.loop import one_step
from jepa.types import Batch

pytestmark = pytest.mark.slow

COMPOSER = Composer()
SIZES = [
    *("image_size=16", "encoder.patch_size=4", "encoder.embed_dim=24", "encoder.depth=1", "encoder.num_heads=2"),
    *("batch_size=4", "steps=2", "num_workers=0", "precision=fp32", "device=cpu", "dataset.num_samples=16"),
    *("evaluation.train_samples=4", "evaluation.val_samples=4", "evaluator=[]", "logger=none"),
]
OF_ENCODER = {
    "spatial": ["dataset=shapes", "dataset.side=16"],
    "temporal": ["dataset=moving_digits", "num_frames=8", "dataset.side=16"],
}
OF_PREDICTOR = {"transformer": ["predictor.width=24", "predictor.depth=1"], "projector": ["predictor.hidden_dim=16"]}
OF_OBJECTIVE = {"jepa": [], "classify": [], "detect": [], "dynamics": [], "mae": ["objective.decoder_depth=1"]}
OF_OBJECTIVE["iris"] = ["objective.dynamics_width=16", "objective.dynamics_depth=1", "objective.decoder_depth=1"]
SMALL_DECODER = ["objective.decoder_depth=1", "objective.latent_dim=4"]


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))


GROUPS = [names(group) for group in ("encoder", "mask", "objective", "regularizer")]


def differs(encoder: str, mask: str, objective: str, regularizer: str) -> bool:
    """False for a pretrained encoder, which is one of the others, and pixels (tests/cli/test_plan_encoders.py).

    Objectives other than jepa refuse all regularisers in the same way, so that one of them is enough.
    """
    return encoder in OF_ENCODER and (objective == "jepa" or regularizer in ("none", "vicreg"))


COMBINATIONS = [chosen for chosen in itertools.product(*GROUPS) if differs(*chosen)]


def refusal(encoder: str, mask: str, objective: str, regularizer: str) -> str | None:
    """A part of the expected message; None if the combination trains."""
    if objective in ("autoencoder", "classify", "detect", "dynamics", "iris", "vae") and mask != "none":
        return "uses no mask"
    if objective == "dynamics":
        return "Dynamics learns from actions"  # tests/cli/test_plan.py trains it on episodes
    if objective != "jepa" and regularizer != "none":
        return "uses no regularizer"
    if objective == "iris" and encoder == "temporal":
        return "takes frames one by one"
    if objective == "detect":
        return "Detector learns from boxes"
    if objective == "mae" and mask == "none":
        return "hides no patch"
    if objective == "jepa" and mask == "none" and regularizer == "none":
        return "regularisers are the whole loss"
    if encoder == "spatial" and mask == "temporal":
        return "needs 2 time steps"
    if encoder == "spatial" and regularizer == "temporal_similarity":
        return "time steps of a clip"
    return None


def overrides(encoder: str, mask: str, objective: str, regularizer: str) -> list[str]:
    chosen = [f"encoder={encoder}", f"mask={mask}", f"objective={objective}", f"regularizer={regularizer}"]
    views = ["augment.views=2", "augment.crop_scale=[0.3,1.0]"] if regularizer == "cross_view" else []
    if objective == "jepa":
        predictor = "projector" if mask == "none" else "transformer"
        return [*chosen, f"predictor={predictor}", *OF_PREDICTOR[predictor], *views]
    return [*chosen, *OF_OBJECTIVE.get(objective, SMALL_DECODER), *views]


@pytest.mark.parametrize("combination", COMBINATIONS, ids=",".join)
def test_a_combination_trains_or_is_refused_with_a_reason(
    combination: tuple[str, str, str, str], tmp_path: Path
) -> None:
    encoder, *_ = combination
    dataset = OF_ENCODER["temporal" if combination[2] == "iris" else encoder]  # iris predicts frames
    checked = COMPOSER.check([*overrides(*combination), *dataset, *SIZES])
    expected = refusal(*combination)
    if expected is not None:
        assert any(expected in fault for fault in checked.errors), checked.errors
        return
    assert checked.errors == []
    config = to_dataclass(checked.config)
    dataset = make_dataset(config)
    session = open_session(device="cpu", precision="fp32")
    run = assemble(split_phases(config, len(dataset))[0], dataset, tmp_path, session)
    before = [p.detach().clone() for p in run.components.objective.backbone.parameters()]
    stream = run.batches(0)
    for step in range(2):
        output, _ = one_step(run.plan, run.components, next(stream), step)
        assert output.loss.isfinite()
        assert output.skipped == 0
    stream.close()
    after = run.components.objective.backbone.parameters()
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    clips = torch.randn(4, *run.components.objective.backbone.clip_shape)
    masks = run.components.masker(4, torch.Generator().manual_seed(0))
    batch = Batch(clips, {"labels": torch.zeros(4, dtype=torch.long)})
    assert all(value.isfinite() for value in run.components.objective.diagnose(batch, masks).values())
    assert all(
        picture.shape[1:] == clips.shape[1:] for picture in run.components.objective.pictures(batch, masks).values()
    )
