"""What must hold between an objective and the other keys of a configuration; a class names its rules. Without torch."""

from __future__ import annotations

from collections.abc import Iterator

from jepa.config import signatures
from jepa.config.view import ConfigView, hides_tokens, not_divisible, pair_of


def mae(view: ConfigView, path: str) -> Iterator[str]:
    if not hides_tokens(view):
        yield "mask=none: hides no patch that objective=mae could predict; try mask=random"


def jepa(view: ConfigView, path: str) -> Iterator[str]:
    """Mask and predictor fit each other: hidden tokens are predicted, or views are compared."""
    if view.get(f"{path}.context_weight", 0) > 0 and not view.get("predictor.joint", False):
        yield f"{view.describe(f'{path}.context_weight')}: needs predictor=transformer with predictor.joint=true"
    if view.get(f"{path}.target_view") == "other" and view["augment.views"] < 2:
        yield f"{view.describe(f'{path}.target_view')}: there is no other crop with augment.views=1; use 2 or more"
    hides = hides_tokens(view)
    for key, default in ((f"{path}.target_view", "same"), (f"{path}.target_layers", 1)):
        if not hides and view.get(key, default) != default:
            yield f"{view.describe(key)} with mask=none: there are no hidden tokens to predict; choose a mask"
    predicts = signatures.traits(view["predictor._target_"]).get("predicts_tokens", True)
    if hides and not predicts:
        yield "predictor=projector: predicts no hidden tokens but compares views: use mask=none"
    elif not hides and predicts:
        yield "mask=none: nothing is hidden that could be predicted; choose a mask, or predictor=projector"
    elif not hides and not view.config.get("regularizer"):
        yield "mask=none: regularisers are the whole loss then, and there is none; try regularizer=[cross_view,sigreg]"


def detector(view: ConfigView, path: str) -> Iterator[str]:
    """A detector learns from one crop of an image."""
    for key, only in {"augment.views": 1, "augment.local_views": 0}.items():
        if view[key] > only:
            yield f"{view.describe(key)}: objective=detect takes one crop of an image: use {key}={only}"
    if view.get(f"{path}.head") == "fcos" and view.get(f"{path}.width", 32) % 32:
        yield f"{view.describe(f'{path}.width')}: objective.head=fcos takes a multiple of 32"


def pyramid(view: ConfigView, path: str) -> Iterator[str]:
    """The coarsest level of a detector's pyramid halves the patch grid."""
    yield from _patches_in_squares(view, 2)


def _patches_in_squares(view: ConfigView, count: int) -> Iterator[str]:
    """Squares of `count` x `count` patches fill a frame."""
    sizes, patches = pair_of(view["image_size"]), pair_of(view["encoder.patch_size"])
    for size, patch in dict.fromkeys(zip(sizes or (), patches or (), strict=False)):
        if not size % patch:
            yield from not_divisible(view, "image_size", size, "encoder.patch_size", count * patch)


def dynamics(view: ConfigView, path: str) -> Iterator[str]:
    """The predictor takes actions, clips are not mirrored, every frame has a state, and states do not collapse."""
    if not view["predictor._target_"].endswith(".ActionPredictor"):
        yield f"{view.describe('predictor')}: objective=dynamics predicts the outcome of actions: use predictor=action"
    elif view["num_frames"] <= view["predictor.history"]:
        both = f"{view.describe('num_frames')} with {view.describe('predictor.history')}"
        yield f"{both}: a history needs at least one more frame to predict"
    elif view["num_frames"] - view["predictor.history"] < view[f"{path}.inverse_steps"]:
        both = f"{view.describe('num_frames')} with {view.describe(f'{path}.inverse_steps')}"
        yield f"{both}: no two frames of a clip are so many steps apart after the history"
    yield from _frames_of_a_world(view, "dynamics")
    if view[f"{path}.target"] == "none" and not view.config.get("regularizer") and not view[f"{path}.freeze"]:
        yield f"{view.describe(f'{path}.target')} without a regularizer: the states would collapse; regularizer=vicreg"


def pixels(view: ConfigView, path: str) -> Iterator[str]:
    if not view["objective._target_"].endswith(".Dynamics"):
        yield "encoder=pixels: has no weights to learn, it is a baseline for objective=dynamics"


def iris(view: ConfigView, path: str) -> Iterator[str]:
    """There is a frame to predict, and squares of `merge` patches fill a frame."""
    yield from _frames_of_a_world(view, "iris")
    if view["num_frames"] < 2:
        yield f"{view.describe('num_frames')}: objective=iris predicts frames from earlier ones: use 2 or more"
    yield from _patches_in_squares(view, view[f"{path}.merge"])


def _frames_of_a_world(view: ConfigView, name: str) -> Iterator[str]:
    """A world is seen frame by frame, whole, and as it is."""
    if hides_tokens(view):
        yield f"{view.describe('mask')}: objective={name} uses no mask: leave it out, or use mask=none"
    if "encoder.tubelet_size" in view:
        yield f"{view.describe('encoder')}: objective={name} takes frames one by one: use encoder=spatial"
    has_actions = "actions" in (signatures.traits(view["dataset._target_"]).get("fields") or ())
    if view["augment.flip"] and has_actions:
        yield f"{view.describe('augment.flip')}: in a mirrored clip the actions would be wrong: use augment.flip=false"
    if view["augment.views"] > 1:
        yield f"{view.describe('augment.views')}: objective={name} takes one crop of a clip: use augment.views=1"
