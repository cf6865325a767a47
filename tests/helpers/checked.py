"""Builds a component as a configuration does: its annotations are checked first."""

import inspect
from typing import Any

from jepa.config import build_with


def checked(component: type, **values: Any) -> Any:
    assert values.keys() <= inspect.signature(component).parameters.keys()
    return build_with({"_target_": f"{component.__module__}.{component.__qualname__}"}, **values)
