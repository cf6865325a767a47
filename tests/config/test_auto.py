"""Settings given as auto: settled by a look at the images, kept with the run, and refused where there is no image."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from jepa.agent import JEPAAgent
from jepa.config import Composer, compose, to_yaml
from jepa.config.attributes import JEPAConfig
from jepa.config.auto import chosen_lines
from jepa.config.schema import changed_keys

PRESET = "experiment=small_folder"


def images(path: Path, side: int, *, grey: bool = False, coloured: int = 0, name: str = "a") -> str:
    """Six images and `coloured` more, of `side` pixels on their shorter side; the override that names their folder."""
    rng = np.random.default_rng(0)
    (path / name).mkdir(parents=True, exist_ok=True)
    for number in range(6 + coloured):
        pixels = rng.integers(0, 256, (side, side + 4 + 4 * number, 3), dtype=np.uint8)
        pixels = pixels[..., :1].repeat(3, axis=2) if grey and number < 6 else pixels
        Image.fromarray(pixels if number % 2 else pixels.swapaxes(0, 1)).save(path / name / f"{side}-{number}.png")
    return f"dataset.root_path={path}"


def shown(*overrides: str) -> dict[str, Any]:
    """What --cfg job shows."""
    composer = Composer()
    composer.needs_data = False
    return composer.compose(overrides)


@pytest.mark.parametrize(
    ("kind", "size", "patch_size", "channels", "grayscale"),
    [
        ({"side": 40}, 32, 8, 3, 0.1),
        ({"side": 48}, 64, 16, 3, 0.1),
        ({"side": 60, "grey": True}, 64, 16, 1, 0),
        ({"side": 20, "grey": True, "coloured": 1}, 32, 8, 3, 0.1),
    ],
)
def test_images_choose_their_settings(
    kind: dict, size: int, patch_size: int, channels: int, grayscale: float, tmp_path: Path
) -> None:
    config = compose([PRESET, images(tmp_path, **kind)])
    assert (config.image_size, config.encoder["patch_size"], config.dataset["channels"]) == (size, patch_size, channels)
    assert config.augment.grayscale == grayscale
    lines = chosen_lines(yaml.safe_load(to_yaml(config)))
    assert lines[0] == f"image_size={size}: the shorter side of the images has {kind['side']} pixels in the median"
    assert [line.partition("=")[0] for line in lines[1:]] == [
        "encoder.patch_size", "dataset.channels", "augment.grayscale",
    ]  # fmt: skip


def test_what_is_typed_stands_and_the_rest_fits_it(tmp_path: Path) -> None:
    data = images(tmp_path, 40, grey=True)
    config = compose([PRESET, data, "image_size=[96,64]", "dataset.channels=3"])
    assert config.image_size == [96, 64]
    assert config.encoder["patch_size"] == [24, 16]
    assert config.dataset["channels"] == 3
    assert config.augment.grayscale == 0
    assert [*config.chosen] == ["encoder.patch_size", "augment.grayscale"]
    assert compose([PRESET, images(tmp_path / "colour", 40), "dataset.channels=1"]).augment.grayscale == 0


def test_every_preset_takes_auto_and_others_have_nothing_chosen(tmp_path: Path) -> None:
    data = images(tmp_path, 40)
    assert "chosen" not in shown("experiment=sign_digits", data)
    config = compose(["experiment=sign_digits", data, "image_size=auto"])
    assert (config.image_size, [*config.chosen]) == (32, ["image_size"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["dataset=cifar10"], "TorchvisionImages is no data set of image files"),
        (["dataset=hf", "dataset.path=somebody/something"], "somebody/something is a name on the hub"),
        (["dataset=webdataset", "dataset.shards=https://x.org/a.tar"], "these come from a server"),
        (["dataset=hf", "dataset.path=x/y", "dataset.stream=true"], "these come from a server"),
    ],
)
def test_data_that_cannot_be_looked_at_are_one_error(overrides: list[str], expected: str) -> None:
    for errors in (Composer().check([PRESET, *overrides]).errors, _errors_shown(PRESET, *overrides)):
        assert len(errors) == 1
        assert errors[0].startswith("image_size=auto encoder.patch_size=auto ")
        assert expected in errors[0]


def _errors_shown(*overrides: str) -> list[str]:
    composer = Composer()
    composer.needs_data = False
    return composer.check(overrides).errors


def test_images_that_cannot_be_read_are_one_error(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"nothing")
    errors = Composer().check([PRESET, f"dataset.root_path={tmp_path}"]).errors
    assert len(errors) == 1
    assert "no image of those looked at can be read" in errors[0]


@pytest.mark.parametrize("override", ["lr=auto", "encoder.depth=auto", "augment.jitter=auto", "augment.grayscale=grey"])
def test_other_keys_are_not_auto(override: str, tmp_path: Path) -> None:
    (error,) = Composer().check([PRESET, images(tmp_path, 40), override]).errors
    assert error.startswith(override)


def test_images_are_looked_at_once_all_else_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jepa.data.survey.look", lambda node: pytest.fail("looked at images"))
    (error,) = Composer().check([PRESET, images(tmp_path, 40), "lr=-1"]).errors
    assert error == "lr=-1: must be above 0"
    (error,) = Composer().check([PRESET, images(tmp_path, 40), "encoder.patch_size=12"]).errors
    assert error.startswith("image_size=auto (experiment/small_folder.yaml) with encoder.patch_size=12: 64 is not")


def test_members_of_a_sweep_look_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    composer, data = Composer(), images(tmp_path, 40)
    composer.check([PRESET, data, "lr=1e-3"])
    monkeypatch.setattr("jepa.data.survey.look", lambda node: pytest.fail("looked at images again"))
    assert composer.compose([PRESET, data, "lr=2e-3"])["image_size"] == 32


def test_settings_are_assumed_where_the_data_are_elsewhere(tmp_path: Path) -> None:
    missing = f"dataset.root_path={tmp_path / 'missing'}"
    for config in (shown(PRESET, missing), Composer().compose([PRESET, missing, "estimate=true"])):
        assert (config["image_size"], config["encoder"]["patch_size"], config["dataset"]["channels"]) == (64, 16, 3)
        assert config["chosen"]["image_size"].startswith("assumed, as no image was looked at: no images")
        assert config["chosen"]["augment.grayscale"] == "assumed"
    assert shown(PRESET, images(tmp_path, 40))["image_size"] == 32


def begin(folder: Path, config: Any) -> None:
    """What the first checkpoint leaves in a run folder."""
    step = folder / "checkpoints" / "step_00000001"
    step.mkdir(parents=True)
    (step / "state.json").write_text("{}")
    (step / "config.yaml").write_text(to_yaml(config))


def test_a_run_keeps_what_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = images(tmp_path / "data", 40)
    images(tmp_path / "data", 40, name="b")
    first = compose([PRESET, data])
    begin(Path("outputs/small_folder"), first)
    begin(Path("elsewhere"), first)
    for number in range(3):
        images(tmp_path / "data", 100, name=f"large{number}")
    again = compose([PRESET, data])
    assert again == first
    assert compose([PRESET, data, "name=another"]).image_size == 64
    assert JEPAAgent(JEPAConfig(PRESET, data, "name=another"), folder="elsewhere").config.image_size == 32
    typed = compose([PRESET, data, "image_size=64", "encoder.patch_size=16"])
    changes = changed_keys(yaml.safe_load(to_yaml(first)), yaml.safe_load(to_yaml(typed)))
    assert changes == ["image_size: 32 -> 64", "encoder.patch_size: 8 -> 16"]


def test_a_run_of_plain_numbers_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = images(tmp_path / "data", 40)
    plain = ["image_size=64", "encoder.patch_size=16", "dataset.channels=3", "augment.grayscale=0.1"]
    begin(Path("outputs/small_folder"), compose([PRESET, data, *plain]))
    config = compose([PRESET, data])
    assert config.image_size == 64
    assert config.chosen["image_size"] == "as when the run was begun"


def test_a_member_of_a_sweep_keeps_what_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = images(tmp_path / "data", 40)
    begin(Path("outputs/small_folder/lr=1"), compose([PRESET, data, "lr=1"]))
    for number in range(3):
        images(tmp_path / "data", 100, name=f"large{number}")
    assert Composer().check([PRESET, data, "lr=1"], sweep_folder="lr=1").config["image_size"] == 32
    assert Composer().check([PRESET, data, "lr=2"], sweep_folder="lr=2").config["image_size"] == 64


def test_config_of_a_run_is_run_again_with_its_reasons_except_for_what_is_typed(tmp_path: Path) -> None:
    config = compose([PRESET, images(tmp_path / "data", 40)])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = Composer(tmp_path, "config").compose(["image_size=64"])
    assert (again["image_size"], again["encoder"]["patch_size"]) == (64, 8)
    assert again["chosen"] == {key: reason for key, reason in config.chosen.items() if key != "image_size"}


def test_the_look_repeats_no_message_of_the_data_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    compose([PRESET, images(tmp_path, 40)])
    assert not caplog.records


def test_parquet_files_and_shards_are_looked_at(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images(tmp_path, 40, grey=True)
    data = [path.read_bytes() for path in sorted((tmp_path / "a").iterdir())]
    rows = pa.array([{"bytes": one, "path": None} for one in data])
    parquet.write_table(pa.table({"image": rows}), tmp_path / "train.parquet")
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for number, one in enumerate(data):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(one)
            tar.addfile(member, io.BytesIO(one))
    for choice in (
        ["dataset=hf", f"dataset.path={tmp_path / 'train.parquet'}"],
        ["dataset=webdataset", f"dataset.shards={tmp_path / 'train.tar'}"],
    ):
        config = compose([PRESET, *choice])
        assert (config.image_size, config.dataset["channels"], config.augment.grayscale) == (32, 1, 0)
