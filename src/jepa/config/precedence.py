"""What is typed wins over what an experiment says, or is refused with the reason. Without torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from jepa.config.catalogue import Choice
from jepa.config.schema import show_value


def implied_values(choice: Choice, is_of_experiment: bool) -> dict[str, Any]:
    """Keys outside its own section that a typed choice sets, as size=large those of the encoder: they win.

    The keys in its section are settings of a component, where the experiment's stay if the component takes them. So
    does all of a component that the experiment has chosen itself, which typing it does not change.
    """
    section = f"{choice.group}."
    is_component = any(key.startswith(section) for key in choice.values)
    if is_component and is_of_experiment:
        return {}
    return {key: value for key, value in choice.values.items() if not key.startswith(section)}


def chooses(experiment: Choice, group: str, name: str) -> bool:
    """True if the defaults list of an experiment makes this choice of a group."""
    pattern = rf"^ *- override /?{re.escape(group)}: *{re.escape(name)} *(#.*)?$"
    return re.search(pattern, experiment.text, re.MULTILINE) is not None


def hidden_values(typed: Mapping[str, str], config: Mapping[str, Any]) -> Iterator[str]:
    """An error for each typed key (key -> override) that the phases make ineffective."""
    phases = config.get("phases")
    if "phases" in typed or not isinstance(phases, Sequence):
        return
    for key in ("image_size", "num_frames", "micro_batch_size"):
        values = [phase[key] for phase in phases if isinstance(phase, Mapping) and key in phase]
        if key in typed and values:
            sizes = ", ".join(map(show_value, values))
            yield f"{typed[key]}: the phases of the run set it ({key}: {sizes}); give phases= too, or phases=[]"


def is_length_typed(typed: Collection[str]) -> bool:
    """True if epochs= is typed and steps= is not: steps of an experiment or a file then give way."""
    return "epochs" in typed and "steps" not in typed
