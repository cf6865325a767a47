"""What a command needs of this machine, as far as files of the operating system tell: before torch is imported."""

from __future__ import annotations

import errno
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jepa.config import signatures
from jepa.config.catalogue import components
from jepa.config.command_rules import output_folder
from jepa.config.layouts import IMAGE_SUFFIXES, VIDEO_SUFFIXES, holds_files, no_files
from jepa.config.schema import ExportConfig, TrainConfig
from jepa.config.view import pair_of
from jepa.errors import ConfigError, RunError, explain
from jepa.parallel.environment import num_cores
from jepa.resources.hardware import GPUS, Cluster, most_seconds

GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/nvmap", "/dev/kfd", "/dev/dxg", "/proc/driver/nvidia/gpus")
"""Files of the drivers of NVIDIA, also of Jetson and of WSL, and of AMD; without any there is no CUDA device."""
FORMAT_PACKAGES = {"transformers": ("transformers",), "onnx": ("onnx", "onnxscript", "onnxruntime")}
"""Format of jepa-export -> the packages of the extra `export` that it imports."""
SIZED = ("size", "experiment", "encoder.embed_dim", "encoder.depth")
"""Keys that choose the size of the encoder."""


def has_gpu() -> bool:
    """False if this machine certainly has no GPU, or hides it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(map(os.path.exists, GPU_FILES))


def check_start(config: Any) -> None:
    """Raises ConfigError if this machine certainly lacks a device, a package or files that a configuration names.

    Raises RunError if it cannot write where the results go.
    """
    missing = [*_missing_packages(config), *_missing_tools(config)]
    if errors := [*_device(getattr(config, "device", "auto")), *_empty_folders(config), *missing]:
        raise ConfigError(errors)
    if name := getattr(config, "name", None):
        check_writable(Path("outputs", name))
    if (out := getattr(config, "out", None)) and (config.images or config.videos):
        check_writable(Path(out).expanduser().parent, Path(out))
    if isinstance(config, ExportConfig) and (folder := output_folder(config.run, config.format, config.output)):
        check_writable(folder)


def check_writable(folder: Path, named: Path | None = None) -> None:
    """Raises RunError, which names `named` or the folder, if it cannot be made or written, or its disk is full."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    number = 0
    if not existing.is_dir():
        number = errno.ENOTDIR
    elif not os.access(existing, os.W_OK):
        number = errno.EROFS if os.statvfs(existing).f_flag & os.ST_RDONLY else errno.EACCES
    elif not os.statvfs(existing).f_bavail:
        number = errno.ENOSPC
    if number:
        raise RunError(explain(OSError(number, os.strerror(number), str(named or folder))))


def _missing_packages(config: Any) -> Iterator[str]:
    """An error for each component that `requires` packages that are not installed: an extra, then its packages."""
    for path, node in components(asdict(config) if is_dataclass(config) and not isinstance(config, type) else {}):
        extra, *packages = signatures.traits(str(node["_target_"])).get("requires", ("",))
        missing = [names for names in packages if all(find_spec(name) is None for name in names.split("|"))]
        if missing:
            needed = " and ".join(names.replace("|", " or ") for names in missing)
            yield f"{path}: {node['_target_'].rpartition('.')[2]} needs {needed}: pip install 'jepa-train[{extra}]'"


def _missing_tools(config: Any) -> Iterator[str]:
    """An error for packages that no component requires but an export format, or the videos of a command."""
    if (videos := getattr(config, "videos", None)) and find_spec("av") is None and find_spec("torchcodec") is None:
        yield f"videos={videos}: videos need av or torchcodec: pip install 'jepa-train[video]'"
    packages = FORMAT_PACKAGES.get(config.format, ()) if isinstance(config, ExportConfig) else ()
    if missing := [name for name in packages if find_spec(name) is None]:
        yield f"format={config.format}: needs {' and '.join(missing)}: pip install 'jepa-train[export]'"


def _device(device: str) -> Iterator[str]:
    if device == "mps" and sys.platform != "darwin":
        yield "device=mps: there is no Apple GPU on this machine; use device=cpu or cuda"
    if device.startswith("cuda") and not has_gpu():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        reason = "this machine has no GPU driver" if hidden is None else f"CUDA_VISIBLE_DEVICES={hidden} hides the GPUs"
        yield f"device={device}: there is no CUDA device, {reason}; use device=cpu"


def _empty_folders(config: Any) -> Iterator[str]:
    """An error for each folder of images or videos without any."""
    for path, node in components({"dataset": getattr(config, "dataset", None)}):
        for key in {"image_folder", "video_folder"} & node.keys():
            folder = Path(node["root_path"], node[key] or "").expanduser().absolute()
            suffixes = VIDEO_SUFFIXES if key == "video_folder" else IMAGE_SUFFIXES
            if folder.is_dir() and not holds_files(folder, suffixes):
                yield f"{path}.{key}={node[key]}: {no_files(folder, suffixes)}"
    for key, suffixes in (("images", IMAGE_SUFFIXES), ("videos", VIDEO_SUFFIXES)):
        given = getattr(config, key, None)
        folder = Path(given).expanduser() if isinstance(given, str) else None
        if folder and folder.is_dir() and not holds_files(folder, suffixes):
            yield f"{key}={given}: {no_files(folder, suffixes)}"


def check_costly_default(config: TrainConfig, typed: Sequence[str] | None, folder: Path) -> None:
    """Raises ConfigError if the default encoder, ViT-B, would be trained on files without a GPU, which takes days.

    Not where an override in `typed` chooses a size or none are known, nor for a run that has begun.
    """
    if typed is None:
        return
    keys = {override.partition("=")[0].lstrip("+") for override in typed}
    has_files = {"root_path", "path", "shards"} & config.dataset.keys()
    if keys & {*SIZED} or not has_files or has_gpu() or config.device == "mps" or (folder / "checkpoints").exists():
        return
    width, depth = config.encoder.get("embed_dim"), config.encoder.get("depth")
    height_width, patch = pair_of(config.image_size), pair_of(config.encoder.get("patch_size"))
    if not (width and depth and height_width and patch):
        return
    steps = max(1, config.num_frames // config.encoder.get("tubelet_size", 1))
    tokens = steps * (height_width[0] // patch[0]) * (height_width[1] // patch[1])
    parameters = 12 * depth * width**2
    samples = (config.steps * config.batch_size if config.steps else 1000 * config.epochs) * config.augment.views
    cores, utilisation = num_cores(), config.hardware.utilisation
    cluster = Cluster(gpu=GPUS["cpu"], count=cores, per_node=cores, utilisation=utilisation, bf16=False)
    hours = most_seconds(parameters, tokens, samples, cluster) / 3600
    work = f"{config.steps:,} steps" if config.steps else f"{config.epochs} epochs of every 1,000 samples"
    raise ConfigError(
        [
            f"size: no size is chosen, and this machine has no GPU: the default encoder of {parameters / 1e6:.0f}M "
            f"parameters takes up to {hours:,.1f} hours for {work} on {cores} CPU cores (what the method needs counts "
            f"estimate=true hardware.gpu=cpu hardware.count={cores}). A smaller one: {_smaller(config, typed)} "
            "(size=base trains the default all the same)"
        ]
    )


def _smaller(config: TrainConfig, typed: Sequence[str]) -> str:
    """The command that trains a small encoder on the same data."""
    if config.dataset["_target_"] == "jepa.data.images.ImageFolder":
        same = [override for override in typed if override.startswith(("dataset.", "name="))]
        return shlex.join(["jepa-train", "experiment=small_folder", *same])
    if config.dataset.get("name") == "cifar10":
        return "jepa-train experiment=cifar10_cpu"
    return shlex.join(["jepa-train", *typed, "size=tiny", "image_size=64", "encoder.patch_size=8"])
