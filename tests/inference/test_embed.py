"""jepa-embed: rows are what the encoder says, a stopped command ends with the same file, no file is lost silently."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from used_run import QUIET, Call, caller, run, write_clip

from jepa import load_encoder
from jepa.config import use_rules
from jepa.config.heads import file_settings, stored_config
from jepa.inference import feature_file
from jepa.inference.embed import Embedding
from jepa.inference.feature_file import Batches, read_features
from jepa.inference.files import all_files

SUFFIXES = ("parquet", "npz", "safetensors")
RUN, PICTURES = "run=outputs/first", "images=pictures"


@pytest.fixture
def embed(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    folder = shutil.copytree(trained, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(folder)
    return caller("embed", capfd)


def paths() -> list[Path]:
    return sorted(Path("pictures").rglob("*.png"))


def test_each_file_has_a_row_with_its_name_and_the_mean_of_its_tokens(embed: Call) -> None:
    ended = embed(RUN, PICTURES, "out=new/features.npz", "batch_size=5")
    assert ended.status == 0, ended.errors
    content = read_features(Path("new/features.npz"))
    assert content.names == [path.relative_to("pictures").as_posix() for path in paths()]
    encoder = load_encoder("outputs/first")
    with torch.no_grad():
        expected = [encoder(encoder.transform([path])).mean(dim=1)[0] for path in paths()]
    torch.testing.assert_close(torch.from_numpy(content.features), torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert content.facts["folder"] == str(Path("pictures").absolute())
    assert content.labels is None
    assert [path.name for path in Path("new").iterdir()] == ["features.npz"], "no batches are left"


def test_a_run_a_checkpoint_and_exports_of_it_give_the_same_features(embed: Call) -> None:
    assert run("export", RUN) == run("export", RUN, "format=timm") == 0
    sources = ["outputs/first", "outputs/first/checkpoints/last", "outputs/first/export/safetensors"]
    contents = []
    for number, source in enumerate([*sources, "timm:local-dir:outputs/first/export/timm"]):
        assert embed(f"run={source}", "images=pictures/val", f"out={number}.npz").status == 0
        contents.append(read_features(Path(f"{number}.npz")).features)
    assert np.array_equal(contents[0], contents[1])
    assert np.array_equal(contents[0], contents[2])
    np.testing.assert_allclose(contents[0], contents[3], rtol=1e-4, atol=1e-5)


def test_all_formats_hold_the_same_and_are_read_by_their_own_libraries(embed: Call) -> None:
    from pyarrow import parquet

    for suffix in SUFFIXES:
        assert embed(RUN, PICTURES, f"out=f.{suffix}", "batch_size=5").status == 0
    ours = [read_features(Path(f"f.{suffix}")) for suffix in SUFFIXES]
    assert all(content.names == ours[0].names and content.facts == ours[0].facts for content in ours)
    with np.load("f.npz") as arrays:
        features = arrays["features"]
    table = parquet.read_table("f.parquet")
    assert table["name"].to_pylist() == ours[0].names
    assert np.array_equal(np.stack([np.array(row) for row in table["features"].to_pylist()]), features)
    assert np.array_equal(load_file("f.safetensors")["features"], features)
    assert all(np.array_equal(content.features, features) for content in ours)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_all_tokens_are_kept_in_half_precision(suffix: str, embed: Call) -> None:
    assert embed(RUN, "images=pictures/val", f"out=f.{suffix}", "readout=all").status == 0
    content, encoder = read_features(Path(f"f.{suffix}")), load_encoder("outputs/first")
    with torch.no_grad():
        tokens = encoder(encoder.transform([Path("pictures/val", content.names[3])]))[0]
    assert content.features.dtype == np.float16
    assert content.features.shape == (12, *tokens.shape)
    assert np.array_equal(content.features[3], tokens.half().numpy())


def test_a_data_set_gives_the_names_of_its_classes_and_its_held_out_part(embed: Call) -> None:
    data = ["dataset=imagefolder", "dataset.root_path=pictures"]
    for suffix in SUFFIXES:
        assert embed(RUN, *data, "part=validation", f"out=f.{suffix}").status == 0
        content = read_features(Path(f"f.{suffix}"))
        assert content.labels == ["ant"] * 6 + ["bee"] * 6
        assert content.names[0] == "ant/00.png"
    assert embed(RUN, *data, "out=t.npz").status == 0
    assert len(read_features(Path("t.npz")).names) == 24


def test_videos_are_read_with_the_frames_of_the_run(embed: Call) -> None:
    for number in range(3):
        write_clip(Path("clips", "deep", f"{number}.mp4"), 40 * number)
    assert embed(RUN, "videos=clips", "out=f.npz").status == 0
    assert read_features(Path("f.npz")).names == [f"deep/{number}.mp4" for number in range(3)]
    settings = {"stride": 3, "short": "skip", "max_value": 9.0}
    dataset = all_files("clips", is_video=True, clip_shape=(3, 2, 8, 8), settings=settings)
    first, second = (float(frame.float().mean()) for frame in dataset[0][0].unbind(dim=1))
    assert second - first == pytest.approx(27, abs=4), "three frames apart"
    ended = embed("run=outputs/first", "videos=pictures", "out=g.npz")
    assert ended.status == 2
    assert "no videos" in ended.errors


def test_files_are_read_as_those_of_the_training_were(embed: Call) -> None:
    stored = {"dataset": {"root_path": "x", "max_value": 4095, "fps": None, "stride": 2, "short": "loop"}}
    settings = file_settings(stored)
    assert settings == {"max_value": 4095, "stride": 2, "short": "loop"}
    assert all_files("pictures", is_video=False, clip_shape=(3, 1, 8, 8), settings=settings).max_value == 4095
    assert file_settings(stored_config("outputs/first")) == {}
    with pytest.raises(ValueError, match="stride"):
        file_settings({"dataset": {"stride": "two"}})


def stop_after(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Ctrl-C after some batches; returns the numbers of the batches that are written."""
    add, written = Batches.add, []

    def stop(self: Batches, batch: int, **arrays: object) -> None:
        if len(written) == number:
            raise KeyboardInterrupt
        add(self, batch, **arrays)
        written.append(batch)

    monkeypatch.setattr(Batches, "add", stop)
    return written


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_stopped_command_goes_on_and_ends_with_the_same_file(suffix: str, embed: Call, monkeypatch) -> None:
    Path("pictures/train/ant/03.png").write_bytes(b"no picture")
    Path("pictures/val/bee/05.png").write_bytes(b"")
    command = [RUN, PICTURES, "batch_size=5"]
    assert embed(*command, f"out=whole.{suffix}").status == 0
    with monkeypatch.context() as patch:
        written = stop_after(patch, 3)
        ended = embed(*command, f"out=f.{suffix}")
    assert ended.status == 130
    assert "run the same command again to continue" in ended.errors
    assert not Path(f"f.{suffix}").exists()
    later = stop_after(monkeypatch, 100)
    ended = embed(*command, f"out=f.{suffix}")
    assert (written, later) == ([0, 1, 2], [3, 4, 5, 6]), "the eighth has one file, which cannot be read"
    assert Path(f"f.{suffix}").read_bytes() == Path(f"whole.{suffix}").read_bytes()
    assert "34 rows" in ended.output
    assert "left out: 2 that cannot be read (train/ant/03.png: " in ended.output, "also one that was read before"
    assert not list(Path().glob(".f*"))


@pytest.mark.slow
def test_a_command_that_is_killed_again_and_again_ends_with_the_same_file(embed: Call, monkeypatch) -> None:
    command = [RUN, PICTURES, "batch_size=1"]
    assert embed(*command, "out=whole.parquet").status == 0
    add = Batches.add
    monkeypatch.setattr(Batches, "add", lambda *given, **arrays: (time.sleep(0.03), add(*given, **arrays)))
    for least in (3, 9, 17):
        process = forked.start(forked.command("embed", [*QUIET, *command, "out=f.parquet"]), Path(), Path("output"))
        while len(list(Path(".f.parquet.batches").glob("0*.npz"))) < least:
            assert process.is_alive(), Path("output").read_text()
            time.sleep(0.01)
        process.kill()
        process.join()
        assert not Path("f.parquet").exists()
    written = stop_after(monkeypatch, 100)
    assert embed(*command, "out=f.parquet").status == 0
    assert 0 < len(written) <= 36 - 17
    assert Path("f.parquet").read_bytes() == Path("whole.parquet").read_bytes()
    assert not list(Path().glob(".f*"))


def test_what_fails_at_the_end_leaves_no_file_and_repeats_no_batch(embed: Call, monkeypatch) -> None:
    def fail(file, content) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(feature_file, "_write_npz", fail)
        ended = embed(RUN, PICTURES, "out=f.npz")
    assert ended.status == 1
    assert "f.npz: No space left on device; make room there" in ended.errors
    assert not Path("f.npz").exists()
    written = stop_after(monkeypatch, 100)
    assert embed(RUN, PICTURES, "out=f.npz").status == 0
    assert written == []


def test_batches_of_other_files_are_not_used(embed: Call, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert embed(RUN, PICTURES, "out=f.npz", "batch_size=5").status == 130
    shutil.copy("pictures/val/bee/01.png", "pictures/train/ant/01.png")
    written = stop_after(monkeypatch, 100)
    assert embed(RUN, PICTURES, "out=f.npz", "batch_size=5").status == 0
    assert written[0] == 0
    content = read_features(Path("f.npz"))
    rows = [content.names.index(name) for name in ("train/ant/01.png", "val/bee/01.png")]
    np.testing.assert_allclose(*content.features[rows], rtol=1e-4, atol=1e-5)


def test_a_damaged_batch_is_named(embed: Call, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        embed(RUN, PICTURES, "out=f.npz", "batch_size=5")
    path = Path(".f.npz.batches/000000001.npz")
    path.write_bytes(path.read_bytes()[:200])
    ended = embed(RUN, PICTURES, "out=f.npz", "batch_size=5")
    assert ended.status == 1
    assert f"{path} is damaged" in ended.errors
    path.unlink()
    assert embed(RUN, PICTURES, "out=f.npz", "batch_size=5").status == 0


def test_a_complete_file_is_not_made_again_and_no_other_one_replaced(embed: Call, monkeypatch) -> None:
    for suffix in SUFFIXES:
        assert embed(RUN, PICTURES, f"out=f.{suffix}").status == 0
    written = stop_after(monkeypatch, 100)
    for suffix in SUFFIXES:
        ended = embed(RUN, PICTURES, f"out=f.{suffix}", "batch_size=7")
        assert ended.output == f"f.{suffix} is complete\n"
        before = Path(f"f.{suffix}").read_bytes()
        ended = embed(RUN, PICTURES, f"out=f.{suffix}", "readout=mean_std")
        assert ended.status == 1
        assert f"f.{suffix} holds features of other files, or of another encoder or readout" in ended.errors
        assert Path(f"f.{suffix}").read_bytes() == before
        Path(f"foreign.{suffix}").write_bytes(b"hello")
        ended = embed(RUN, PICTURES, f"out=foreign.{suffix}")
        assert ended.status == 1
        assert f"foreign.{suffix} holds no features of jepa-embed" in ended.errors
        assert Path(f"foreign.{suffix}").read_bytes() == b"hello"
    os.utime("pictures/val/bee/05.png", (1, 1))
    assert "holds features of other files" in embed(RUN, PICTURES, "out=f.npz").errors
    assert written == []


def test_files_that_cannot_be_read_are_named_on_the_terminal_and_in_the_file(embed: Call) -> None:
    Path("pictures/notes.txt").write_text("hello")
    for name in ("train/ant/00.png", "train/ant/01.png", "val/bee/00.png", "val/bee/01.png"):
        Path("pictures", name).write_bytes(b"")
    ended = embed(RUN, PICTURES, "out=f.npz", "batch_size=2")
    assert ended.status == 0
    assert "left out: 1 files of other types (.txt)" in ended.errors
    assert ended.output.startswith("f.npz: 32 rows")
    assert "left out: 4 that cannot be read (train/ant/00.png: an empty file; " in ended.output
    assert "and 1 more" in ended.output
    content = read_features(Path("f.npz"))
    assert list(content.facts["unreadable"].items())[3] == ("val/bee/01.png", "an empty file")
    assert len(content.names) == len(content.features) == 32


def test_nothing_that_can_be_read_is_an_error(embed: Call) -> None:
    for path in paths():
        path.write_bytes(b"")
    ended = embed(RUN, PICTURES, "out=f.npz")
    assert ended.status == 1
    assert "no file can be read; the first: " in ended.errors
    assert "pictures/train/ant/00.png: an empty file" in ended.errors


def test_neighbours_of_a_picture_are_printed_and_shown(embed: Call) -> None:
    picture = "pictures/val/bee/02.png"
    ended = embed(RUN, PICTURES, "out=f.parquet", f"like={picture}", "neighbours=3", "page=pages/n.html")
    assert ended.status == 0, ended.errors
    lines = ended.output.splitlines()
    assert lines[2].split() == ["val/bee/02.png", "1.0000"]
    assert len(lines) == 6
    assert lines[-1] == "page: pages/n.html"
    content = read_features(Path("f.parquet"))
    vectors = content.features / np.linalg.norm(content.features, axis=1, keepdims=True)
    cosines = vectors @ vectors[content.names.index("val/bee/02.png")]
    assert [line.split()[0] for line in lines[2:5]] == [content.names[k] for k in np.argsort(-cosines)[:3]]
    assert Path("pages/n.html").read_text().count("data:image/") == 4
    Path("pictures/val/bee/02.png").rename("elsewhere.png")
    again = embed(RUN, "out=f.parquet", "like=elsewhere.png", "neighbours=3", "page=pages/n.html")
    assert again.output.splitlines()[1].split() == ["val/bee/02.png", "1.0000"], "from the file alone"
    assert 'src="data:,"><figcaption><span>02.png</span>' in Path("pages/n.html").read_text(), "it is not there"


def test_neighbours_are_not_looked_for_among_features_of_another_encoder(embed: Call) -> None:
    assert embed(RUN, PICTURES, "out=f.npz").status == 0
    ended = embed(RUN, "out=f.npz", "like=pictures/val/bee/02.png", "layers=2")
    assert ended.status in (1, 2)
    shutil.copytree("outputs/first", "outputs/other", symlinks=True)
    ended = embed(RUN, "out=f.npz", "like=pictures/val/bee/02.png", "readout=mean_std")
    assert ended.status == 1
    assert "f.npz was made with run=outputs/first readout=mean" in ended.errors
    Path("torn.png").write_bytes(b"")
    ended = embed(RUN, "out=f.npz", "like=torn.png")
    assert ended.status == 1
    assert "like=torn.png: an empty file" in ended.errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([RUN, "out=f.npz"], "images, videos or dataset: one must be given"),
        ([RUN, PICTURES, "videos=pictures", "out=f.npz"], "images and videos: give one of them"),
        ([RUN, "images=none", "out=f.npz"], "images=none: there is no "),
        (["run=outputs/none", PICTURES, "out=f.npz"], "outputs/none does not exist"),
        ([RUN, PICTURES, "out=f.csv"], "takes a file that ends in .parquet, .npz or .safetensors"),
        ([RUN, PICTURES], "out=VALUE"),
        ([RUN, PICTURES, "out=f.npz", "page=x.html"], "give like=PICTURE"),
        ([RUN, PICTURES, "out=f.npz", "readout=all", "like=pictures/val/bee/00.png"], "use readout=mean"),
        ([RUN, PICTURES, "out=f.npz", "readuot=mean"], 'did you mean "readout"?'),
        ([RUN, "dataset=imagfolder", "out=f.npz"], 'did you mean "imagefolder"?'),
        ([RUN, "dataset=mnist", "dataset.download=false", "out=f.npz"], "dataset.download"),
        ([RUN, PICTURES, "out=f.npz", "readout=cls"], "the encoder has no class token"),
    ],
)
def test_what_cannot_be_is_refused_by_name(arguments: list[str], message: str, embed: Call) -> None:
    ended = embed(*arguments)
    assert ended.status == 2
    assert message in ended.errors
    assert "Traceback" not in ended.errors
    assert not list(Path().glob(".f*"))


def test_parquet_without_its_package_is_refused_with_what_to_install(embed: Call, monkeypatch) -> None:
    monkeypatch.setattr(use_rules, "find_spec", lambda name: None)
    monkeypatch.setattr(Embedding, "__init__", lambda *_: pytest.fail("nothing is loaded"))
    ended = embed(RUN, PICTURES, "out=f.parquet")
    assert ended.status == 2
    assert "pip install 'jepa-train[parquet]'" in ended.errors


@pytest.mark.slow
def test_refusals_and_help_of_both_commands_come_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from jepa.cli import embed, predict; bad = ['run=no', 'images=no', 'out=x']; "
        "assert embed.main(bad) == predict.main(bad) == 2; assert embed.main(['-h']) == predict.main(['-h']) == 0; "
        "assert not {'torch', 'timm', 'pyarrow'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "readout=mean" in result.stdout
    assert "min_score=0.5" in result.stdout


def test_names_that_are_no_text_are_kept_readable(embed: Call) -> None:
    shutil.copy("pictures/val/bee/00.png", os.fsdecode(b"pictures/caf\xe9.png"))
    assert embed(RUN, PICTURES, "out=f.safetensors").status == 0
    assert json.dumps(read_features(Path("f.safetensors")).names[0]) == json.dumps("caf\\xe9.png")
