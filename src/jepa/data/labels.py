"""Whether the labels of a data set can be learned, and judged on samples that are not trained on."""

from __future__ import annotations

import logging

import numpy as np

from jepa.types import Dataset

MAX_NAMES = 10

log = logging.getLogger(__name__)


def check_labels(dataset: Dataset) -> None:
    """Warns of classes without a sample in one of the parts, as far as the parts' `labels` tell.

    Raises ValueError where a part has no labels or there is no held-out part: to judge on samples whose labels are
    learned would tell nothing.
    """
    held_out = dataset.validation()
    if held_out is None:
        raise ValueError(
            "objective: labels are learned, so they must be judged on samples that are not trained on, and the data "
            "set has no held-out part; name one, as with dataset.val_folder or dataset.val"
        )
    for part, name in ((dataset, "training"), (held_out, "held-out")):
        labels = getattr(part, "labels", None)
        if labels is None:
            continue  # drawn on the fly, of all classes
        found = set(np.unique(labels).tolist()) - {-1}
        if not found:
            raise ValueError(f"objective: labels are learned, and none of the {len(part):,} {name} samples has one")
        lacking = [one for number, one in enumerate(dataset.classes) if number not in found]
        if lacking:
            more = f" and {len(lacking) - MAX_NAMES} more" if len(lacking) > MAX_NAMES else ""
            log.warning("no %s sample is of %s%s", name, ", ".join(lacking[:MAX_NAMES]), more)
