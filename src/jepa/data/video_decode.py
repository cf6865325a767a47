"""Frames of video files as uint8 tensors, decoded by torchcodec or PyAV to the same pixels."""

from __future__ import annotations

import logging
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from itertools import dropwhile
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from jepa.config.layouts import VIDEO_SUFFIXES
from jepa.data.loader import first_line

log = logging.getLogger(__name__)
T = TypeVar("T")
SUFFIXES = VIDEO_SUFFIXES
"""Suffixes of video files."""
CACHED_BYTES = 2**23
"""Largest size in bytes of a file whose packets PyAV keeps in memory after indexing it."""
_DECODE_ERRORS = (RuntimeError, ValueError, IndexError, OSError)
"""Exceptions of both libraries on damaged files."""


def read_video(path: str, decoders: Sequence[str], read: Callable[[Video], T]) -> T:
    """The result of `read` on the open file, decoded in one thread by the first of `decoders` that succeeds.

    Raises OSError with one line if none does.
    """
    reasons = []
    for decoder in decoders:
        try:
            with closing(_DECODERS[decoder](path)) as video:
                return read(video)
        except _DECODE_ERRORS as error:
            reasons.append(_reason(error, path))
    raise OSError(reasons[0])


def choose_decoders(decoder: str) -> tuple[str, ...]:
    """The decoders that can be imported; `auto` prefers PyAV, the faster one, to torchcodec.

    Warns if PyAV is missing; raises ValueError if no decoder is left.
    """
    reasons = {name: _import_error(name) for name in (_DECODERS if decoder == "auto" else [decoder])}
    available = tuple(name for name, reason in reasons.items() if reason is None)
    if not available:
        details = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        remedy = "pip install 'jepa-train[video]', and FFmpeg for torchcodec (apt install ffmpeg)"
        raise ValueError(f"dataset.decoder={decoder}: videos can't be read; {details}. Needed: {remedy}")
    if reasons.get("pyav"):
        log.warning("videos are read with torchcodec, since PyAV can't be loaded: %s", reasons["pyav"])
    return available


def _import_error(decoder: str) -> str | None:
    try:
        if decoder == "pyav":
            import av  # noqa: F401
        else:
            import torchcodec.decoders

            if getattr(torchcodec, "ffmpeg_major_version", "unknown") is None:
                return f"no FFmpeg libraries for it (apt install ffmpeg), or not made for torch {torch.__version__}"
    except (ImportError, OSError, RuntimeError) as error:
        return first_line(error)
    return None


def _reason(error: BaseException, path: str) -> str:
    """The error in one line, without the path and the line of the library's source."""
    line = getattr(error, "strerror", None) or first_line(error)
    line = re.sub(r"^\w+, \S+\.cpp:\d+, ", "", line.replace(f"{path} ", ""))
    return "it has no video stream" if line.startswith("The best video stream") else line


class TorchcodecVideo:
    """As PyAVVideo, by torchcodec, which scans the file when it opens it."""

    def __init__(self, path: str) -> None:
        from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportPrivateImportUsage]

        self.decoder = VideoDecoder(path, num_ffmpeg_threads=1)
        metadata = self.decoder.metadata
        self.num_frames = len(self.decoder)
        self.begin, self.end = float(metadata.begin_stream_seconds or 0), float(metadata.end_stream_seconds or 0)
        if not self.num_frames or not self.end > self.begin:
            raise OSError("its video stream is empty")

    def close(self) -> None:
        del self.decoder

    def at(self, indices: Sequence[int]) -> Tensor:
        first, step = indices[0], (indices[1] - indices[0] if len(indices) > 1 else 1)
        if step > 0 and list(indices) == list(range(first, indices[-1] + 1, step)):
            return self.decoder.get_frames_in_range(first, indices[-1] + 1, step).data  # 7 % faster
        return self.decoder.get_frames_at(list(indices)).data

    def frames_at_seconds(self, seconds: Sequence[float]) -> Tensor:
        return self.decoder.get_frames_played_at(list(seconds)).data


class PyAVVideo:
    """Decodes from the key frame before the requested frames and skips frames that no other frame refers to.

    Packets of a short file are kept in memory after indexing; those of a longer file are read again.
    """

    def __init__(self, path: str) -> None:
        import av
        from av.video.reformatter import VideoReformatter

        self.container = av.open(path)
        stream: Any = self.container.streams.best("video")
        if stream is None:
            raise OSError("it has no video stream")
        self.stream, self.context, self.reformatter = stream, stream.codec_context, VideoReformatter()
        self.context.thread_count = 1
        self.size = stream.width, stream.height
        packets = self.container.demux(stream)
        self.packets = list(packets) if os.path.getsize(path) <= CACHED_BYTES else []
        self._index(self.packets or packets)

    def _index(self, packets: Iterable[Any]) -> None:
        """Times of all frames and of the key frames, from the packets' headers."""
        headers = [
            (p.pts, _decoding_time(p), p.is_keyframe, p.duration)
            for p in packets
            if p.size and p.pts is not None and not p.is_discard
        ]
        if not headers:
            raise OSError("its video stream is empty")
        headers.sort(key=lambda header: header[0])
        self.times = [time for time, *_ in headers]
        self.keys = [(time, decoded) for time, decoded, is_key, _ in headers if is_key] or [headers[0][:2]]
        self.num_frames = len(headers)
        tick = float(self.stream.time_base)
        last = headers[-1][3] or (self.times[-1] - self.times[0]) / max(1, self.num_frames - 1)
        self.begin, self.end = self.times[0] * tick, (self.times[-1] + (last or 1)) * tick

    def close(self) -> None:
        self.container.close()

    def at(self, indices: Sequence[int]) -> Tensor:
        """uint8 [T, 3, H, W], the frames with these numbers"""
        times = sorted({self.times[index] for index in indices})
        by_key_frame: dict[int, set[int]] = {}
        for time in times:
            number = max(0, bisect_right(self.keys, time, key=lambda key: key[0]) - 1)
            by_key_frame.setdefault(self.keys[number][1], set()).add(time)
        pictures: dict[int, np.ndarray] = {}
        for begin, requested in by_key_frame.items():
            pictures |= self._decode(begin, requested, skip=True)
        if missing := set(times) - set(pictures):
            pictures |= self._decode(self.keys[0][1], missing, skip=False)
        if missing := set(times) - set(pictures):
            raise OSError(f"the frame at {min(missing) * float(self.stream.time_base):.3f} s can't be decoded")
        return torch.from_numpy(np.stack([pictures[self.times[i]] for i in indices])).permute(0, 3, 1, 2)

    def frames_at_seconds(self, seconds: Sequence[float]) -> Tensor:
        """uint8 [T, 3, H, W], the frames displayed at these times"""
        ticks = np.asarray(seconds) / float(self.stream.time_base) + 1e-6
        return self.at((np.searchsorted(self.times, ticks, side="right") - 1).clip(min=0).tolist())

    def _decode(self, begin: int, requested: set[int], skip: bool) -> dict[int, np.ndarray]:
        """uint8 [H, W, 3] by time, of the requested times; decodes from the key frame at `begin` on."""
        pictures = {}
        for packet in self._packets_from(begin):
            is_needed = not skip or packet.pts is None or packet.pts in requested
            self.context.skip_frame = "DEFAULT" if is_needed else "NONREF"
            pictures |= {frame.pts: self._picture(frame) for frame in packet.decode() if frame.pts in requested}
            if len(pictures) == len(requested):
                break
        return pictures

    def _packets_from(self, begin: int) -> Iterable[Any]:
        if not self.packets:
            self.container.seek(begin, stream=self.stream)
            return self.container.demux(self.stream)
        self.context.flush_buffers()
        return dropwhile(lambda packet: _decoding_time(packet) != begin, self.packets)

    def _picture(self, frame: Any) -> np.ndarray:
        """uint8 [H, W, 3], a view unless the frame is rotated"""
        width, height = self.size
        plane: Any = self.reformatter.reformat(frame, width, height, "rgb24", threads=1).planes[0]
        picture = np.ndarray((height, width, 3), np.uint8, plane, strides=(plane.line_size, 3, 1))
        return np.rot90(picture, frame.rotation // 90) if frame.rotation else picture


def _decoding_time(packet: Any) -> int:
    return packet.pts if packet.dts is None else packet.dts


Video = PyAVVideo | TorchcodecVideo
"""An open file with `num_frames` frames from `begin` to `end`, in seconds."""
_DECODERS: dict[str, Any] = {"pyav": PyAVVideo, "torchcodec": TorchcodecVideo}
