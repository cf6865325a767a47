"""device=mps takes the path of other devices, without a call of torch.cuda; no Apple GPU is needed here."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jepa.config import ConfigError, compose
from jepa.config.machine import check_start
from jepa.parallel.device import double, has_fast_bf16, peak_memory_gib, total_memory
from jepa.parallel.session import open_session


@pytest.fixture
def _an_apple_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says that there is one, and every function of torch.cuda fails."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.cuda was called")

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for name in ("is_available", "device_count", "is_bf16_supported", "max_memory_allocated", "set_device"):
        monkeypatch.setattr(torch.cuda, name, fail)


@pytest.mark.usefixtures("_an_apple_gpu")
def test_a_session_on_an_apple_gpu_calls_nothing_of_cuda() -> None:
    session = open_session(device="mps", precision="auto")
    assert (session.device.type, session.bf16) == ("mps", False)
    assert open_session(device="mps", precision="bf16").bf16
    assert not has_fast_bf16(session.device)
    assert peak_memory_gib(session.device) > 0
    assert total_memory(session.device) > 0


@pytest.mark.usefixtures("_an_apple_gpu")
def test_several_processes_cannot_share_it() -> None:
    with pytest.raises(ValueError, match="one process"):
        open_session(device="mps", precision="fp32", local_rank=0)
    with pytest.raises(ConfigError, match=r"device=mps.*one process"):
        compose(["device=mps", "processes=2"])


def test_float64_is_computed_on_the_cpu_for_it() -> None:
    moved = torch.ones(2)
    on_apple: Any = SimpleNamespace(device=torch.device("mps"), cpu=lambda: moved, double=None)
    assert double(on_apple).dtype == torch.float64
    assert double(moved).equal(moved.double())


def test_a_machine_without_one_refuses_it_before_and_after_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(ConfigError, match="device=mps: there is no Apple GPU"):
        check_start(compose(["device=mps"]))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds no Apple GPU"):
        open_session(device="mps", precision="auto")
