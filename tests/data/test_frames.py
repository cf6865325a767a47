"""Folders of numbered images as videos: order, clips, held-out folders and quantities from a table."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from checked import checked
from PIL import Image

from jepa.data.frames import FrameFolders
from jepa.data.loader import batches
from jepa.types import ClipDataset

SHARED = Path(__file__).parents[3] / "shared" / "data"


def write(folder: Path, numbers=range(20), name: str = "{}.png", size: tuple[int, int] = (8, 6)) -> None:
    """Frame n has the value n everywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.new("RGB", size, (number % 256,) * 3).save(folder / name.format(number))


def dataset(root: Path, **arguments) -> FrameFolders:
    return checked(FrameFolders, **{"num_frames": 4, "root_path": str(root), "val_ratio": 0.0} | arguments)


def values(clip: torch.Tensor) -> list[int]:
    return clip[0, :, 0, 0].tolist()


def test_frames_come_in_the_order_of_their_numbers(tmp_path):
    write(tmp_path / "a", range(5, 13), "frame_{}.png")  # frame_10 before frame_9 by letters
    clip, label, _ = dataset(tmp_path)[0]
    assert (clip.dtype, tuple(clip.shape), label) == (torch.uint8, (3, 4, 6, 8), -1)
    assert values(clip) == [5, 6, 7, 8]
    assert values(dataset(tmp_path)[1][0]) == [9, 10, 11, 12]
    assert dataset(tmp_path).describe(1) == f"{tmp_path}/a from frame 4 on"


@pytest.mark.parametrize(("hop", "firsts"), [(None, [0, 7]), (1, list(range(14))), (5, [0, 5, 10])])
def test_clips_begin_every_hop_frames(tmp_path, hop, firsts):
    write(tmp_path / "a")
    videos = dataset(tmp_path, stride=2, hop=hop)
    assert [values(videos[i][0])[0] for i in range(len(videos))] == firsts
    assert all(values(videos[i][0]) == [n, n + 2, n + 4, n + 6] for i, n in enumerate(firsts))


def test_draws_reach_every_frame_and_stay_in_their_folder(tmp_path):
    write(tmp_path / "a", range(11))
    write(tmp_path / "b", range(100, 109))
    videos = dataset(tmp_path)
    first_frames = {values(videos.draw(i, seed)[0])[0] for i in range(len(videos)) for seed in range(50)}
    assert first_frames == {*range(8), *range(100, 106)}
    assert values(videos.draw(1, 3)[0]) == values(videos.draw(1, 3)[0])
    assert isinstance(videos, ClipDataset)


def test_gaps_and_duplicate_numbers_are_warned_of(tmp_path, caplog):
    write(tmp_path / "a", [0, 1, 2, 5, 6])
    write(tmp_path / "b", [*range(4)])
    write(tmp_path / "b", [2], "{}.bmp")
    dataset(tmp_path)
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert lines == [
        f"{tmp_path}/a: 5 frames from 0.png to 6.png, 2 numbers are missing",
        f"{tmp_path}/b: 5 frames from 0.png to 3.png, some numbers occur twice",
    ]


def test_parent_folders_are_classes_and_short_folders_are_left_out_and_counted(tmp_path, caplog):
    write(tmp_path / "run" / "a", range(4))
    write(tmp_path / "walk" / "b", range(9))
    write(tmp_path / "walk" / "c", range(3))
    videos = dataset(tmp_path)
    assert videos.classes == ("run", "walk")
    assert [videos[i][1] for i in range(len(videos))] == [0, 1, 1]
    assert "1 of 3 videos are shorter than a clip of 4 frames at stride 1; short=skip" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({"val_ratio": 0.5}, ["c", "d"]), ({"val_folders": ["b"]}, ["b"]), ({"val_ratio": 0.01}, ["d"]), ({}, [])],
)
def test_whole_folders_are_held_out(tmp_path, arguments, expected):
    for name in "abcd":
        write(tmp_path / name, range(4))
    videos = dataset(tmp_path, **arguments)
    held_out = videos.validation()
    names = [Path(held_out.describe(i).split(" from")[0]).name for i in range(len(held_out))] if held_out else []
    assert names == expected
    assert len(videos) == 4 - len(expected)


def test_quantities_are_those_of_the_frame_before_the_middle(tmp_path):
    for name, start in (("a", 0), ("b", 50)):
        write(tmp_path / "frames" / name, range(start, start + 12), "{:03d}.png")
    rows = [f"{n},{folder}/{n:03d}.png,{n * 0.5}" for folder, s in (("a", 0), ("b", 50)) for n in range(s, s + 12)]
    (tmp_path / "steps.csv").write_text("t,file,angle\n" + "\n".join(rows) + "\n")
    arguments = {
        "image_folder": "frames",
        "annotations": "steps.csv",
        "columns": ["wheel/angle", "time/t"],
    }
    videos = dataset(tmp_path, num_frames=5, stride=2, lag=1, val_ratio=0.5, **arguments)
    held_out = videos.validation()
    assert videos.fields["quantities"].names == ("wheel/angle", "time/t")
    assert videos[0].fields["quantities"].tolist() == [1.5, 3.0]  # frames 0 2 4 6 8: the middle is 4, one before it 3
    assert held_out is not None
    assert held_out[0].fields["quantities"].tolist() == [26.5, 53.0]
    assert dataset(tmp_path, lag=9, **arguments)[0].fields["quantities"].tolist() == [0.0, 0.0]
    assert torch.equal(pickle.loads(pickle.dumps(videos))[0].fields["quantities"], videos[0].fields["quantities"])


def test_frames_of_other_sizes_make_a_broken_sample(tmp_path):
    write(tmp_path / "a", range(8))
    write(tmp_path / "a", [6], size=(9, 9))
    write(tmp_path / "b", range(4))
    videos = dataset(tmp_path)
    with pytest.raises(OSError, match=r"a/6\.png is of another size"):
        videos[1]
    batch = next(batches(videos, batch_size=3, seed=0, num_workers=0))
    assert 1 in batch.broken.tolist()
    assert batch.pixels.shape == (3, 3, 4, 6, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stride": 7}, "no clip of 4 frames at stride 7"),
        ({"val_folders": ["z"]}, r"no folders \['z'\]; there are a, b"),
        ({"hop": 0}, "hop=0"),
        ({"lag": -1}, "lag=-1"),
        ({"image_folder": "a"}, "no folder of images"),
        ({"annotations": "none.csv"}, r"there is no file .*none\.csv"),
        (
            {"annotations": "steps.csv", "columns": ["x/speed"]},
            "no column speed; its first line names file, angle",
        ),
        ({"annotations": "steps.csv", "columns": ["x/angle"]}, "angle must be numbers"),
    ],
)
def test_invalid_arguments_are_refused(tmp_path, arguments, message):
    write(tmp_path / "a")
    write(tmp_path / "b")
    (tmp_path / "steps.csv").write_text("file,angle\na/0.png,left\n")
    with pytest.raises(ValueError, match=message):
        dataset(tmp_path, **arguments)


def test_frames_without_a_number_are_refused(tmp_path):
    write(tmp_path / "a", [1, 2, 3, 4])
    write(tmp_path / "a", [0], "cover.png")
    with pytest.raises(ValueError, match=r"cover\.png, a frame without a number"):
        dataset(tmp_path)


@pytest.mark.skipif(not (SHARED / "driving-rc-4k.tar").is_file(), reason="needs driving-rc-4k.tar")
def test_real_episodes_are_read_with_their_steering(tmp_path):
    shutil.unpack_archive(SHARED / "driving-rc-4k.tar", tmp_path)
    videos = FrameFolders(
        num_frames=16, root_path=str(tmp_path / "driving-rc-4k"), image_folder="frames", hop=8, lag=4,
        annotations="steps.csv", columns=["steering/angle", "throttle/throttle"],
    )  # fmt: skip
    held_out = videos.validation()
    assert held_out is not None
    assert len(videos.folders) + len(held_out.folders) == 6
    assert videos[3][0].shape == (3, 16, 120, 160)
    quantities = torch.stack([videos[i].fields["quantities"] for i in range(len(videos))])
    assert quantities.isfinite().all()
    assert (quantities.std(0) > 0.01).all()


def test_a_frame_without_a_row_is_nan_and_a_table_with_other_paths_is_refused(tmp_path):
    write(tmp_path / "frames" / "a", range(8), "{:03d}.png")
    arguments = {"image_folder": "frames", "annotations": "steps.csv", "columns": ["wheel/angle"], "val_ratio": 0.0}
    (tmp_path / "steps.csv").write_text("file,angle\na/000.png,1.5\n")
    videos = dataset(tmp_path, num_frames=4, **arguments)
    assert videos[0].fields["quantities"].isnan().tolist() == [True]
    (tmp_path / "steps.csv").write_text("file,angle\nframes/a/000.png,1.5\n")
    with pytest.raises(ValueError, match=r"paths such as frames/a/000\.png, none is .* such as a/000\.png"):
        dataset(tmp_path, num_frames=4, **arguments)


def test_links_and_loose_images_are_left_out_and_counted(tmp_path, caplog):
    write(tmp_path / "one", range(4))
    write(tmp_path / "two", range(4))
    (tmp_path / "one" / "again").symlink_to("..")
    (tmp_path / "one" / "3.png").rename(tmp_path / "loose3.png")
    with caplog.at_level("INFO"):
        frames = FrameFolders(num_frames=2, root_path=str(tmp_path), val_ratio=0.0)
    assert frames.folders == ("one", "two")
    line = next(record.getMessage() for record in caplog.records if "left out" in record.getMessage())
    assert "frames in 2 folders" in line
    assert "1 links to folders that are listed anyway" in line
    assert "1 images in no folder of a video" in line
