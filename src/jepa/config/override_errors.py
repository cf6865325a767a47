"""What to say of an override that cannot be used. Without torch."""

from __future__ import annotations

import re

from hydra.core.override_parser.types import Override
from omegaconf.errors import OmegaConfBaseException


def needs_multirun(override: Override) -> str:
    as_list = f"{override.key_or_group}=[{override.get_value_string()}]"
    return f"{override.input_line}: several values need --multirun, which runs one after the other; a list is {as_list}"


def syntax_error(text: str) -> str:
    """The probable mistake in an override that cannot be parsed."""
    if "=" not in text:
        return f"{text}: cannot be read; an override is KEY=VALUE"
    key, _, value = text.partition("=")
    return f"{text}: cannot be read; quote special characters, as '{key}=\"{value}\"' with both kinds of quotes"


def hydra_message(error: Exception) -> str:
    """Hydra's own message on one line; another one for a group that the command lacks."""
    if lacking := re.match(r"Could not override '([\w/]+)'\. No match", str(error)):
        return f"{lacking[1]}: this command has no such group; its --help lists those that it has"
    reason = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in f"{reason}".splitlines() if line.strip() and "full_key" not in line]
    return " ".join(line for line in lines if not line.startswith("object_type"))
