"""Frames of video files as uint8 tensors, by torchcodec or PyAV: the same pixels."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from jepa.data.loader import first_line

log = logging.getLogger(__name__)

T = TypeVar("T")

SUFFIXES = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".3gp")
"""of the files that count as videos"""

_FAULTS = (RuntimeError, ValueError, IndexError, OSError)
"""what both libraries raise on damaged files"""


class Video(Protocol):
    """An open file: `num_frames` frames from `begin` to `end`, in seconds."""

    num_frames: int
    begin: float
    end: float

    def at(self, indices: Sequence[int]) -> Tensor:
        """uint8 [T, 3, H, W], the frames of these numbers"""
        ...

    def shown_at(self, seconds: Sequence[float]) -> Tensor:
        """uint8 [T, 3, H, W], the frames on the screen at these times"""
        ...


def look_at(path: str, decoders: Sequence[str], look: Callable[[Video], T]) -> T:
    """What `look` makes of the file, open while it looks; raises OSError with one line where no decoder can read it.

    The next is asked where one fails: torchcodec misses the last frames of some files. One thread decodes.
    """
    reasons = []
    for decoder in decoders:
        try:
            with _DECODERS[decoder](path) as video:
                return look(video)
        except _FAULTS as fault:
            reasons.append(_reason(fault, path))
    raise OSError(reasons[0])


def choose_decoders(decoder: str) -> tuple[str, ...]:
    """`auto` is torchcodec and PyAV; where torchcodec is absent a warning says why, where both are ValueError."""
    if decoder not in ("auto", *_DECODERS):
        raise ValueError(f"dataset.decoder={decoder}: expected auto, {' or '.join(_DECODERS)}")
    absent = {name: _why_absent(name) for name in (_DECODERS if decoder == "auto" else [decoder])}
    found = tuple(name for name, reason in absent.items() if reason is None)
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in absent.items())
        remedy = "pip install 'jepa-train[video]', and FFmpeg for torchcodec (apt install ffmpeg)"
        raise ValueError(f"dataset.decoder={decoder}: videos can't be read; {reasons}. Needed: {remedy}")
    if absent.get("torchcodec"):
        log.warning("videos are read with PyAV, since torchcodec can't be loaded: %s", absent["torchcodec"])
    return found


def faster_first(decoders: tuple[str, ...], num_wanted: int, length: float) -> tuple[str, ...]:
    """By measurement: PyAV here skips frames that no other needs, which pays where most of a video is not wanted."""
    first = "pyav" if length > 2 * num_wanted else "torchcodec"
    return tuple(sorted(decoders, key=lambda name: name != first))


def _why_absent(decoder: str) -> str | None:
    try:
        if decoder == "pyav":
            import av  # noqa: F401
        else:
            import torchcodec.decoders

            if getattr(torchcodec, "ffmpeg_major_version", "unknown") is None:
                return f"no FFmpeg libraries for it (apt install ffmpeg), or not made for torch {torch.__version__}"
    except (ImportError, OSError, RuntimeError) as fault:
        return first_line(fault)
    return None


def _reason(fault: BaseException, path: str) -> str:
    """One line, without the path and the place in the library's source."""
    line = getattr(fault, "strerror", None) or first_line(fault)
    line = re.sub(r"^\w+, \S+\.cpp:\d+, ", "", line.replace(f"{path} ", ""))
    return "it has no video stream" if line.startswith("The best video stream") else line


class TorchcodecVideo:
    """Exact in time: the file is scanned when it is opened."""

    def __init__(self, path: str) -> None:
        from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportPrivateImportUsage]

        self.decoder = VideoDecoder(path, num_ffmpeg_threads=1)
        metadata = self.decoder.metadata
        self.num_frames = len(self.decoder)
        self.begin, self.end = float(metadata.begin_stream_seconds or 0), float(metadata.end_stream_seconds or 0)
        if not self.num_frames or not self.end > self.begin:
            raise OSError("its video stream is empty")

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        del self.decoder

    def at(self, indices: Sequence[int]) -> Tensor:
        first, step = indices[0], (indices[1] - indices[0] if len(indices) > 1 else 1)
        if step > 0 and list(indices) == list(range(first, indices[-1] + 1, step)):
            return self.decoder.get_frames_in_range(first, indices[-1] + 1, step).data  # 7 % faster
        return self.decoder.get_frames_at(list(indices)).data

    def shown_at(self, seconds: Sequence[float]) -> Tensor:
        return self.decoder.get_frames_played_at(list(seconds)).data


class PyAVVideo:
    """The same by seeking to the key frame before; what no other frame refers to is decoded only where it is wanted."""

    def __init__(self, path: str) -> None:
        import av
        from av.video.reformatter import VideoReformatter

        self.container = av.open(path)
        stream: Any = self.container.streams.best("video")
        if stream is None:
            raise OSError("it has no video stream")
        self.stream, self.context, self.reformatter = stream, stream.codec_context, VideoReformatter()
        self.context.thread_count = 1
        self._index()

    def _index(self) -> None:
        """Times of all frames and of the key frames, from the packets' heads."""
        packets = [p for p in self.container.demux(self.stream) if p.size and p.pts is not None and not p.is_discard]
        if not packets:
            raise OSError("its video stream is empty")
        packets.sort(key=lambda packet: packet.pts)
        self.times = [packet.pts for packet in packets]
        keys = [packet for packet in packets if packet.is_keyframe] or packets[:1]
        self.keys = [(packet.pts, packet.pts if packet.dts is None else packet.dts) for packet in keys]
        self.num_frames = len(packets)
        tick = float(self.stream.time_base)
        last = packets[-1].duration or (self.times[-1] - self.times[0]) / max(1, self.num_frames - 1)
        self.begin, self.end = self.times[0] * tick, (self.times[-1] + (last or 1)) * tick

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def at(self, indices: Sequence[int]) -> Tensor:
        order = sorted({self.times[index] for index in indices})
        found: dict[int, np.ndarray] = {}
        for begin, wanted in self._by_key_frame(order).items():
            found |= self._decode(begin, wanted, skip=True)
        if missing := set(order) - set(found):
            found |= self._decode(self.keys[0][1], missing, skip=False)
        if missing := set(order) - set(found):
            raise OSError(f"the frame at {min(missing) * float(self.stream.time_base):.3f} s can't be decoded")
        return torch.from_numpy(np.stack([found[self.times[i]] for i in indices])).permute(0, 3, 1, 2)

    def shown_at(self, seconds: Sequence[float]) -> Tensor:
        ticks = np.asarray(seconds) / float(self.stream.time_base) + 1e-6
        return self.at((np.searchsorted(self.times, ticks, side="right") - 1).clip(min=0).tolist())

    def _by_key_frame(self, order: Sequence[int]) -> dict[int, set[int]]:
        """Times of frames by the decoding time of the key frame before them."""
        places = np.searchsorted([shown for shown, _ in self.keys], order, side="right") - 1
        groups: dict[int, set[int]] = {}
        for time, place in zip(order, places.clip(min=0).tolist(), strict=True):
            groups.setdefault(self.keys[place][1], set()).add(time)
        return groups

    def _decode(self, begin: int, wanted: set[int], skip: bool) -> dict[int, np.ndarray]:
        """uint8 [H, W, 3] by time"""
        found = {}
        self.container.seek(begin, stream=self.stream)
        for packet in self.container.demux(self.stream):
            is_needed = not skip or packet.pts is None or packet.pts in wanted
            self.context.skip_frame = "DEFAULT" if is_needed else "NONREF"
            found |= {frame.pts: self._picture(frame) for frame in packet.decode() if frame.pts in wanted}
            if len(found) == len(wanted):
                break
        return found

    def _picture(self, frame: Any) -> np.ndarray:
        width, height = self.stream.width, self.stream.height
        picture = self.reformatter.reformat(frame, width, height, "rgb24", threads=1).to_ndarray()
        return np.rot90(picture, frame.rotation // 90) if frame.rotation else picture


_DECODERS: dict[str, Any] = {"torchcodec": TorchcodecVideo, "pyav": PyAVVideo}
