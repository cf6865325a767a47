"""Clips of video files: choice of the frames, formats, decoders, and errors for damaged files."""

import os
import pickle
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from checked import checked

from jepa.data import video_decode
from jepa.data.clips import even_start, frame_positions, random_start, to_grey
from jepa.data.loader import BrokenSamples, DataError, batches
from jepa.data.video_decode import Video, choose_decoders, read_video
from jepa.data.videos import VideoFolder
from jepa.types import ClipDataset

SHARED = Path(__file__).parents[3] / "shared" / "data"


OPEN_GOP = {"codec": "libx264", "pixels": "yuv420p", "g": "5", "x264-params": "open-gop=1"}


def torchcodec_works() -> bool:
    try:
        return bool(choose_decoders("torchcodec"))
    except ValueError:
        return False


DECODERS = [
    pytest.param(
        "torchcodec",
        marks=pytest.mark.skipif(
            not torchcodec_works() and os.environ.get("CI") != "true", reason="torchcodec or FFmpeg is not installed"
        ),
    ),
    "pyav",
]
both = pytest.mark.parametrize("decoder", DECODERS)


def pictures(count: int, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    """uint8 [n, H, W, 3]: frame n has the value 10 n on the left and is bright on top"""
    frames = np.zeros((count, *size, 3), np.uint8)
    frames += (np.arange(count, dtype=np.uint8) * 10)[:, None, None, None]
    frames[:, : size[0] // 4, size[1] // 2 :] = 255
    return frames


def write(
    path: Path, count: int = 20, codec: str = "ffv1", pixels: str = "bgr0", rate: int = 10,
    times: list[int] | None = None, size: tuple[int, int] = (32, 48), **options: str,
) -> Path:  # fmt: skip
    """A video; `times` are those of the frames in milliseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = size
        stream.pix_fmt = pixels
        if times:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for number, picture in enumerate(pictures(count, size)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_audio(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        for _ in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def numbers(clip: torch.Tensor) -> list[int]:
    """Which frames of `pictures` a clip [C, T, H, W] shows."""
    return (clip[0, :, -4:, :4].float().mean((1, 2)) / 10).round().int().tolist()


def dataset(root: Path, **arguments) -> VideoFolder:
    return checked(
        VideoFolder, **{"num_frames": 4, "root_path": str(root), "video_folder": ".", "decoder": "pyav"} | arguments
    )


@pytest.mark.parametrize(
    ("length", "start", "expected"),
    [(10, 0.0, [0, 2, 4]), (10, 0.999, [5, 7, 9]), (10, 0.5, [3, 5, 7]), (5, 0.9, [0, 2, 4]), (3, 0.9, [0, 2, 2])],
)
def test_a_clip_lies_inside_the_video_at_its_start(length, start, expected):
    assert frame_positions(length, 3, 2, start, "hold") == expected


def test_a_short_video_is_looped_or_skipped():
    assert frame_positions(3, 5, 1, 0.3, "loop") == [0, 1, 2, 0, 1]
    with pytest.raises(OSError, match="3 frames are shorter"):
        frame_positions(3, 5, 1, 0.3, "skip")


def test_starts_are_even_or_uniformly_random():
    assert [even_start(i, 4) for i in range(4)] == [0.125, 0.375, 0.625, 0.875]
    starts = np.array([random_start(index, seed) for index in range(30) for seed in range(30)])
    assert starts.min() >= 0
    assert starts.max() < 1
    assert np.abs(np.histogram(starts, 10, (0, 1))[0] - 90).max() < 40


@both
def test_stride_chooses_frames_by_number_in_the_centre(tmp_path, decoder):
    write(tmp_path / "a.mkv")
    clip, label = dataset(tmp_path, stride=3, decoder=decoder)[0]
    assert (clip.dtype, tuple(clip.shape), label) == (torch.uint8, (3, 4, 32, 48), -1)
    assert numbers(clip) == [5, 8, 11, 14]
    several = dataset(tmp_path, stride=3, decoder=decoder, clips_per_video=3)
    assert [numbers(several[i][0])[0] for i in range(len(several))] == [1, 5, 9]
    assert several.describe(2) == f"{tmp_path}/a.mkv clip 3 of 3"


@both
def test_fps_chooses_frames_by_their_times(tmp_path, decoder):
    write(tmp_path / "constant" / "a.mkv", rate=10)
    assert numbers(dataset(tmp_path / "constant", fps=5, decoder=decoder)[0][0]) == [7, 9, 11, 13]
    times = [0, 100, 150, 400, 450, 1000, 1050, 1100, 1150, 1200]  # 10 frames in 1.3 seconds
    write(tmp_path / "variable" / "a.mkv", count=10, times=times)
    videos = dataset(tmp_path / "variable", fps=4, decoder=decoder)
    clips = {tuple(numbers(videos.draw(0, seed)[0])) for seed in range(40)}
    begins = (np.arange(5) + 0.5) * 0.13 + 0.25 * np.arange(4)[:, None]  # in the middle of an average frame
    expected = {tuple((np.searchsorted(times, 1000 * begin, side="right") - 1).tolist()) for begin in begins.T}
    assert clips <= expected
    assert len(clips) > 1


@both
def test_a_draw_is_pure_in_index_and_seed_and_reaches_every_start(tmp_path, decoder):
    write(tmp_path / "a.mkv")
    videos = dataset(tmp_path, stride=4, decoder=decoder)
    assert torch.equal(videos.draw(0, 5)[0], videos.draw(0, 5)[0])
    firsts = {numbers(videos.draw(0, seed)[0])[0] for seed in range(60)}
    assert firsts == set(range(8))
    assert isinstance(videos, ClipDataset)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("h264.mp4", {"codec": "libx264", "pixels": "yuv420p", "bf": "3", "g": "6"}),
        ("one_key.mp4", {"codec": "libx264", "pixels": "yuv420p", "g": "250"}),
        ("open_gop.mkv", OPEN_GOP),
        ("old.avi", {"codec": "mpeg4", "pixels": "yuv420p"}),
        ("alpha.mov", {"codec": "qtrle", "pixels": "argb"}),
        ("png.mov", {"codec": "png", "pixels": "rgba"}),
        ("grey.mkv", {"pixels": "gray"}),
        ("odd.mkv", {"size": (33, 47)}),
        ("ten_bits.mkv", {"pixels": "yuv420p10le"}),
        ("variable.mkv", {"times": [n * n * 7 + 20 for n in range(20)]}),
    ],
)
def test_both_decoders_give_the_written_frames(tmp_path, monkeypatch, name, options):
    path = str(write(tmp_path / name, **options))
    results = {}

    def read(video: Video) -> tuple[torch.Tensor, int, float]:
        times = np.linspace(video.begin, video.end - 1e-3, 9).tolist()
        clip = torch.cat([video.at([0, 5, 10, 15]), video.at([18, 3, 3]), video.frames_at_seconds(times)])
        return clip, video.num_frames, round(video.begin, 2)

    for decoder in ["pyav", *(["torchcodec"] if torchcodec_works() and name != "open_gop.mkv" else [])]:
        results[decoder] = read_video(path, [decoder], read)
    assert numbers(results["pyav"][0].transpose(0, 1))[:7] == [0, 5, 10, 15, 18, 3, 3]
    for clip, *facts in results.values():
        assert facts == list(results["pyav"][1:])
        assert (results["pyav"][0].int() - clip.int()).abs().max() <= 2
    monkeypatch.setattr(video_decode, "CACHED_BYTES", 0)  # as for a long file, whose packets are not cached
    again, *facts = read_video(path, ["pyav"], read)
    assert torch.equal(again, results["pyav"][0])
    assert facts == list(results["pyav"][1:])


def test_the_last_frame_is_read_if_one_decoder_misses_it(tmp_path):
    decoders = [*(["torchcodec"] if torchcodec_works() else []), "pyav"]
    clip = read_video(str(write(tmp_path / "a.mkv", **OPEN_GOP)), decoders, lambda video: video.at([19]))
    assert numbers(clip.transpose(0, 1)) == [19]


@both
def test_a_rotated_video_is_decoded_upright(tmp_path, decoder):
    if shutil.which("ffmpeg") is None and os.environ.get("CI") != "true":
        pytest.skip("FFmpeg's program is not installed")
    write(tmp_path / "a.mp4", codec="libx264", pixels="yuv420p")
    command = ["ffmpeg", "-loglevel", "error", "-i", "a.mp4", "-metadata:s:v", "rotate=90", "-c", "copy", "b.mp4"]
    subprocess.run(command, cwd=tmp_path, check=True)
    frame = read_video(str(tmp_path / "b.mp4"), [decoder], lambda video: video.at([0])[0, 0])
    assert frame.shape == (48, 32)
    assert (frame[:20, :6] > 200).all()  # the corner that FFmpeg's own program shows bright


def test_grey_is_the_weighted_mean(tmp_path):
    write(tmp_path / "a.mkv")
    colour, grey = dataset(tmp_path)[0][0], dataset(tmp_path, channels=1)[0][0]
    assert grey.shape == (1, 4, 32, 48)
    assert (grey.int() - colour[:1].int()).abs().max() <= 1  # the pictures have no colour
    assert to_grey(torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)).item() == 76


def test_folders_are_classes_and_the_folder_test_is_held_out(tmp_path):
    for part, label in (("train", "run"), ("train", "walk"), ("test", "walk")):
        write(tmp_path / part / label / "a.mkv", 5)
    videos = dataset(tmp_path, video_folder="train")
    held_out = videos.validation()
    assert (videos.classes, [videos[i][1] for i in range(2)]) == (("run", "walk"), [0, 1])
    assert held_out is not None
    assert (len(held_out), held_out[0][1], held_out.validation()) == (1, 1, None)
    assert pickle.loads(pickle.dumps(videos)).describe(1) == str(tmp_path / "train" / "walk" / "a.mkv")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_gives_files_and_labels(tmp_path, kind):
    for name in ("a", "b", "deep/c"):
        write(tmp_path / "clips" / f"{name}.mkv", 5)
    columns = {"path": ["deep/c.mkv", "a.mkv", "b.mkv"], "label": ["walk", "", "run"]}
    if kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").table(columns), tmp_path / "all.parquet")
    else:
        rows = "\n".join(map(",".join, zip(*columns.values(), strict=True)))
        (tmp_path / "all.csv").write_text(f"path,label\n{rows}\n")
    (tmp_path / "val.csv").write_text("path,label\na.mkv,run\n")
    arguments = {"video_folder": "clips", "annotations": f"all.{kind}", "val_annotations": "val.csv"}
    videos = dataset(tmp_path, **arguments)
    held_out = videos.validation()
    assert (videos.classes, [videos[i][1] for i in range(3)]) == (("run", "walk"), [1, -1, 0])
    assert held_out is not None
    assert (len(held_out), held_out[0][1]) == (1, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mkv 3\n", r"no column path, label; its first line names a\.mkv 3"),
        ("path,label\nnowhere.mkv,3\n", r"nowhere\.mkv.* are not in"),
        ("path,label\na.mkv\n", r"the line a\.mkv has 1 values, the first line 2"),
    ],
)
def test_an_invalid_table_is_refused(tmp_path, text, message):
    write(tmp_path / "a.mkv", 5)
    (tmp_path / "all.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        dataset(tmp_path, annotations="all.csv")


@pytest.mark.parametrize(
    ("short", "expected"), [("hold", [0, 1, 2, 2]), ("loop", [0, 1, 2, 0])]
)  # fmt: skip
@both
def test_short_videos_are_counted_in_one_line_and_padded(tmp_path, caplog, decoder, short, expected):
    write(tmp_path / "a.mkv", 3)
    write(tmp_path / "b.mkv", 9)
    videos = dataset(tmp_path, short=short, decoder=decoder)
    assert len(videos) == 2
    assert numbers(videos[0][0]) == numbers(videos.draw(0, 3)[0]) == expected
    assert numbers(dataset(tmp_path, short=short, fps=10, decoder=decoder)[0][0]) == expected
    lines = [record.getMessage() for record in caplog.records if "shorter" in record.getMessage()]
    assert lines[0].startswith(
        f"{tmp_path}: 1 of 2 videos are shorter than a clip of 4 frames at stride 1; short={short}"
    )


def test_short_videos_can_be_skipped(tmp_path, caplog):
    write(tmp_path / "a.mkv", 3)
    write(tmp_path / "b.mkv", 9)
    videos = dataset(tmp_path, short="skip")
    assert (len(videos), videos.describe(0)) == (1, str(tmp_path / "b.mkv"))
    assert "1 of 2 videos are shorter" in caplog.text
    with pytest.raises(ValueError, match=r"short=skip: no video in .* has 4 frames at stride 5"):
        dataset(tmp_path, short="skip", stride=5)


def damaged(folder: Path) -> None:
    """Files of every kind that can't be read."""
    whole = write(folder / "whole.mp4", codec="libx264", pixels="yuv420p").read_bytes()
    (folder / "whole.mp4").unlink()
    (folder / "half.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "nothing.mp4").write_bytes(b"")
    (folder / "text.mkv").write_text("This is no video." * 50)
    write_audio(folder / "audio.mp4")


@both
def test_a_damaged_file_raises_oserror_with_one_line(tmp_path, decoder):
    damaged(tmp_path)
    for name in ("half.mp4", "nothing.mp4", "text.mkv", "audio.mp4", "absent.mp4"):
        with pytest.raises(OSError, match=r"^[^\n]+$") as error:
            read_video(str(tmp_path / name), [decoder], len)
        assert ".cpp" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damaged_files_are_skipped_and_counted_and_too_many_are_an_error(tmp_path, caplog, num_workers):
    damaged(tmp_path)
    with pytest.raises(ValueError, match=r"none of 4 videos can be read; the first is .*audio\.mp4: it has no video"):
        dataset(tmp_path)
    write(tmp_path / "z.mkv")
    videos = dataset(tmp_path)
    batch = next(batches(videos, batch_size=5, seed=0, num_workers=num_workers))
    assert batch.pixels.shape == (5, 3, 4, 32, 48)
    assert set(batch.broken.tolist()) == {0, 1, 2, 3}
    with pytest.raises(DataError, match="4 of 5 samples can't be read"):
        BrokenSamples(videos).add(batch.broken)
    assert "audio.mp4: it has no video stream" in caplog.text


def test_sizes_may_be_mixed_in_one_folder(tmp_path):
    write(tmp_path / "a.mkv", size=(32, 48))
    write(tmp_path / "b.mkv", size=(64, 20))
    batch = next(batches(dataset(tmp_path), batch_size=2, seed=0, num_workers=0))
    assert batch.pixels.shape == (2, 3, 4, 64, 48)
    assert sorted(batch.sizes.tolist()) == [[32, 48], [64, 20]]


def test_an_fps_above_the_rate_of_the_files_is_refused(tmp_path):
    write(tmp_path / "a.mkv", rate=10)
    with pytest.raises(ValueError, match=r"dataset\.fps=25: 1 of 1 videos .* at least 10; the first is .*a\.mkv, 10"):
        dataset(tmp_path, fps=25)
    assert len(dataset(tmp_path, fps=10.05)) == 1  # as 30 for 29.97


def test_one_slow_file_among_many_is_a_broken_sample(tmp_path):
    write(tmp_path / "000.mkv", rate=20)
    for number in range(1, 120):
        os.link(tmp_path / "000.mkv", tmp_path / f"{number:03d}.mkv")
    write(tmp_path / "slow.mkv", rate=10)
    videos = dataset(tmp_path, fps=20)
    with pytest.raises(OSError, match=r"^10 frames a second, fewer than dataset\.fps=20$"):
        videos[120]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fps": 5, "stride": 2}, r"dataset\.fps=5 dataset\.stride=2: give one"),
        ({"short": "cut"}, "short=cut"),
        ({"stride": 0}, "stride=0"),
        ({"clips_per_video": 0}, r"clips_per_video=0"),
        ({"decoder": "decord"}, "decoder=decord"),
        ({"video_folder": "trian"}, r"dataset\.video_folder: there is no folder"),
        ({"channels": 4}, r"channels=4"),
    ],
)
def test_invalid_arguments_are_refused(tmp_path, arguments, message):
    write(tmp_path / "a.mkv", 5)
    with pytest.raises(ValueError, match=message):
        dataset(tmp_path, **arguments)


def test_the_fallback_is_logged_with_its_reason(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "av", None)
    if torchcodec_works():
        assert choose_decoders("auto") == ("torchcodec",)
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith("videos are read with torchcodec, since PyAV can't be loaded: import of av")
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(ValueError, match=r"jepa-train\[video\].*FFmpeg"):
        choose_decoders("auto")


def test_torchcodec_without_ffmpeg_is_not_used(monkeypatch):
    torchcodec = pytest.importorskip("torchcodec")
    monkeypatch.setattr(torchcodec, "ffmpeg_major_version", None)
    assert choose_decoders("auto") == ("pyav",)
    with pytest.raises(ValueError, match="no FFmpeg libraries"):
        choose_decoders("torchcodec")


def test_each_epoch_draws_other_starts_and_a_step_can_be_repeated(tmp_path):
    for name in "abcd":
        write(tmp_path / f"{name}.mkv", 25)
    stream = batches(dataset(tmp_path), batch_size=4, seed=0, num_workers=0)
    epochs = [next(stream) for _ in range(6)]
    firsts = {tuple(sorted(numbers(clip)[0] for clip in batch.pixels)) for batch in epochs}
    assert len(firsts) > 3
    again = next(batches(dataset(tmp_path), batch_size=4, seed=0, first_step=5, num_workers=1))
    assert torch.equal(again.pixels, epochs[5].pixels)


@pytest.mark.skipif(not (SHARED / "driving-turn.tar").is_file(), reason="needs driving-turn.tar")
@both
def test_real_videos_are_read(tmp_path, decoder):
    shutil.unpack_archive(SHARED / "driving-turn.tar", tmp_path)
    videos = dataset(tmp_path / "driving-turn", video_folder="train", num_frames=16, decoder=decoder)
    assert (len(videos), videos.classes) == (577, ("left", "right", "straight"))
    assert videos[300][0].shape == (3, 16, 120, 160)


def test_every_clip_has_the_label_and_the_source_of_its_video(tmp_path):
    for name in ("left", "right"):
        write(tmp_path / name / "0.mkv")
    videos = dataset(tmp_path, clips_per_video=3)
    assert videos.labels.tolist() == [0, 0, 0, 1, 1, 1] == [videos[index][1] for index in range(6)]
    assert [videos.source(index) for index in range(6)] == [0, 0, 0, 1, 1, 1]
