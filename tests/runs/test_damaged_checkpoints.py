"""A damaged checkpoint is refused with the name of another one, whichever of them is damaged."""

from pathlib import Path

import pytest
import torch

from jepa.parallel.session import open_session
from jepa.runs import checkpoint
from jepa.runs.checkpoint import CheckpointError, Writer


@pytest.mark.parametrize(("damaged", "other"), [(1, 2), (2, 1)])
def test_the_other_checkpoint_is_named(tmp_path: Path, damaged: int, other: int) -> None:
    writer = Writer(tmp_path, open_session(device="cpu", precision="fp32"), keep=5)
    for step in (1, 2):
        writer.save(step=step, tensors={"model.weight": torch.ones(2)}, config="seed: 3\n", state={})
    folder = checkpoint.checkpoint_folder(tmp_path, damaged)
    (folder / "config.yaml").write_text("seed: 4\n")
    with pytest.raises(CheckpointError, match=f"step_0000000{damaged} is damaged.*step_0000000{other}"):
        checkpoint.read_state(folder)
