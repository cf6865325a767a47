"""How fast images are decoded and augmented on one core, against torchvision's pipeline of Pillow images.

python scripts/bench_loader.py [VIDEO_FOLDER ...] prints one line of JSON, or one for each folder of videos.

Both sides read the same JPEG files (500x375, about 70 KiB, made here with the spectrum of photographs) and deliver
batches of 32 crops of 224 pixels, flipped and normalised. They take turns, in processor time, on one thread; a ratio is
the median over the turns. `loader_ratio` is against Pillow's bicubic resampling, `loader_ratio_bilinear` against its
bilinear one, which is the filter that ours has too.

Of videos, clips of 16 frames are read from the same places by torchcodec alone (open, exact seek, the frames of the
clip, nothing more) and by the data set with each decoder: `video_ratio` is the former's processor time over that of
decoder=auto.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.functional import InterpolationMode

from jepa.data.folders import IMAGENET_STATS
from jepa.data.images import ImageFolder
from jepa.data.loader import batches
from jepa.data.transforms import Augment
from jepa.data.videos import VideoFolder
from jepa.types import RawBatch

BATCH = 32
SIZE = (224, 224)
CROP_SCALE, CROP_ASPECT = (0.3, 1.0), (0.75, 4 / 3)
MEAN, STD = IMAGENET_STATS[3]


def measure_loader(turns: int = 15) -> dict[str, float]:
    """Prints and returns images per second and ratios of one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        kibibytes = write_photographs(Path(folder) / "train")
        pipelines = {
            "ours": our_pipeline(folder),
            "pillow_bicubic": pillow_pipeline(folder, InterpolationMode.BICUBIC),
            "pillow_bilinear": pillow_pipeline(folder, InterpolationMode.BILINEAR),
        }
        for pipeline in pipelines.values():
            assert pipeline().shape[-2:] == SIZE
        costs = {name: [] for name in pipelines}
        for _ in range(turns):
            for name, pipeline in pipelines.items():
                costs[name].append(processor_seconds(pipeline) / BATCH)
    torch.set_num_threads(threads)
    result = {f"{name}_images_per_s": round(1 / statistics.median(values), 1) for name, values in costs.items()}
    result["loader_ratio"] = median_ratio(costs["pillow_bicubic"], costs["ours"])
    result["loader_ratio_bilinear"] = median_ratio(costs["pillow_bilinear"], costs["ours"])
    result["small_image_us"] = round(small_image_cost() * 1e6, 1)
    result["jpeg_kib"] = round(kibibytes, 1)
    print(json.dumps(result))
    return result


def median_ratio(slow: list[float], fast: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(slow, fast, strict=True)), 3)


def processor_seconds(work: Callable[[], Tensor]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def our_pipeline(folder: str) -> Callable[[], Tensor]:
    """What a worker and the main process do, in one process."""
    augment = Augment(
        image_size=SIZE, crop_scale=CROP_SCALE, crop_aspect=CROP_ASPECT, flip=True, mean=MEAN, std=STD
    )  # fmt: skip
    images = ImageFolder(root_path=folder, image_folder="train")
    stream = batches(images, batch_size=BATCH, seed=0, num_workers=0, short_side=augment.short_side)
    generator = torch.Generator().manual_seed(0)
    return lambda: augment(next(stream), generator).clips


def pillow_pipeline(folder: str, interpolation: InterpolationMode) -> Callable[[], Tensor]:
    """torchvision's classic: decode, crop and resize, flip, to a tensor, normalise, one image after the other."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, scale=CROP_SCALE, ratio=CROP_ASPECT, interpolation=interpolation),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    paths = sorted(Path(folder).rglob("*.jpg"))
    return lambda: torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])


def small_image_cost(turns: int = 9) -> float:
    """Processor seconds for the augmentation of one 32x32 image in a batch of 256, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pixels = torch.randint(0, 256, (256, 1, 32, 32, 3), dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    labels, none = torch.full((256,), -1), torch.empty(0, dtype=torch.long)
    raw = RawBatch(pixels, torch.full((256, 2), 32), {"labels": labels}, none, torch.zeros_like(labels))
    augment = Augment(
        image_size=(32, 32), crop_scale=CROP_SCALE, crop_aspect=CROP_ASPECT, flip=True, mean=MEAN, std=STD
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    cost = min(processor_seconds(lambda: augment(raw, generator).clips) for _ in range(turns)) / 256
    torch.set_num_threads(threads)
    return cost


def write_photographs(folder: Path) -> float:
    """`BATCH` JPEG files of 500x375 pixels; returns their mean size in KiB."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(BATCH):
        Image.fromarray(photograph(random)).save(folder / f"{number:03d}.jpg", quality=86)
    return sum(path.stat().st_size for path in folder.iterdir()) / BATCH / 1024


def photograph(random: np.random.Generator, height: int = 375, width: int = 500) -> np.ndarray:
    """uint8 [H, W, 3] noise whose amplitude falls with frequency as in photographs, mostly in brightness"""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    falloff = 1 / np.maximum(frequency, 1 / width) ** 1.25
    planes = [
        np.fft.irfft2(np.fft.rfft2(random.normal(size=(height, width))) * falloff, (height, width)) for _ in range(4)
    ]
    brightness, *colours = (plane / plane.std() for plane in planes)
    return np.clip(np.stack([120 + 50 * brightness + 12 * c for c in colours], axis=-1), 0, 255).astype(np.uint8)


def measure_videos(folder: str, num_frames: int = 16, turns: int = 5, most: int = 40) -> dict[str, Any]:
    """Prints and returns clips per second and ratios of one core, at stride 1 and, where all are long enough, 4."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {"videos": folder}
    for stride in (1, 4):
        try:
            readers = {name: open_videos(folder, num_frames, stride, name) for name in ("auto", "torchcodec", "pyav")}
        except ValueError:  # none is long enough
            continue
        indices = range(0, len(readers["auto"]), -(-len(readers["auto"]) // most))
        alone = [partial(torchcodec_alone, readers["auto"].describe(i), num_frames, stride) for i in indices]
        assert all(torch.equal(read(), readers["auto"][i][0]) for read, i in zip(alone[:3], indices, strict=False))
        costs = {name: [] for name in ("alone", *readers)}
        for _ in range(turns):
            costs["alone"].append(sum(processor_seconds(read) for read in alone))
            for name, videos in readers.items():
                costs[name].append(sum(processor_seconds(partial(clip_of, videos, i)) for i in indices))
        for name, values in costs.items():
            result[f"{name}_clips_per_s_stride{stride}"] = round(len(indices) / statistics.median(values), 1)
        for name in readers:
            kind = "" if name == "auto" else f"_{name}"
            result[f"video_ratio{kind}_stride{stride}"] = median_ratio(costs["alone"], costs[name])
    print(json.dumps(result))
    return result


def open_videos(folder: str, num_frames: int, stride: int, decoder: str) -> VideoFolder:
    return VideoFolder(
        num_frames=num_frames, root_path=folder, video_folder=".", stride=stride, decoder=decoder, short="skip"
    )  # fmt: skip


def clip_of(videos: VideoFolder, index: int) -> Tensor:
    return videos[index][0]


def torchcodec_alone(path: str, num_frames: int, stride: int) -> Tensor:
    """The central clip [C, T, H, W]"""
    from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportPrivateImportUsage]

    decoder = VideoDecoder(path, num_ffmpeg_threads=1)
    span = (num_frames - 1) * stride + 1
    first = (len(decoder) - span + 1) // 2
    return decoder.get_frames_in_range(first, first + span, stride).data.transpose(0, 1)


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        measure_videos(folder)
    if not sys.argv[1:]:
        measure_loader()
