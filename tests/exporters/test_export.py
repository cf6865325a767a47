"""Exported encoders compute the same tokens in other libraries; a failed export leaves no files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hostile_text import HOSTILE
from torch import Tensor, nn

from jepa.cli.export import main
from jepa.config import ConfigError, compose_export
from jepa.config.catalogue import conf_folder
from jepa.data.transforms import EvalTransform
from jepa.encoders.pretrained import TimmEncoder, open_encoder
from jepa.encoders.spatial import SpatialEncoder
from jepa.encoders.temporal import TemporalEncoder
from jepa.errors import RunError
from jepa.exporters import export
from jepa.exporters import timm as timm_export
from jepa.exporters.card import Provenance, card, read_provenance
from jepa.exporters.export import Exported, export_encoder, export_format, push_to_hub
from jepa.runs.checkpoint import FORMAT

SIZES: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}

RUN_SNIPPETS = """\
import sys
sys.modules["jepa"] = None
import torch
results = {}
for name in sys.argv[1:]:
    space = {}
    exec(open(name + ".py").read(), space)
    variables = ("images", "pixels", "tokens", "features")
    results[name] = {key: torch.as_tensor(space[key]) for key in variables if key in space}
torch.save(results, "results.pt")
"""


def encoder_of(kind: type, clip_shape: tuple[int, ...], **changes: Any) -> Any:
    """A random encoder whose output depends on every tensor; the channel statistics of its transform differ."""
    torch.manual_seed(0)
    encoder = kind(clip_shape=clip_shape, **(SIZES | changes))
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.2)
    channels = clip_shape[0]
    mean, std = [0.5, 0.4, 0.3][:channels], [0.2, 0.3, 0.25][:channels]
    encoder.transform = EvalTransform(image_size=(clip_shape[2], clip_shape[3]), mean=mean, std=std)
    return encoder.eval()


CASES: dict[str, tuple[str, Any]] = {
    "timm_wide": ("timm", lambda: encoder_of(SpatialEncoder, (1, 1, 16, 24), patch_size=(8, 4), depth=2)),
    "timm_frames": ("timm", lambda: encoder_of(SpatialEncoder, (3, 4, 16, 16), mlp_ratio=2.5)),
    "transformers_images": (
        "transformers",
        lambda: encoder_of(SpatialEncoder, (3, 1, 16, 16), position="table", depth=2),
    ),
    "transformers_wide": ("transformers", lambda: encoder_of(SpatialEncoder, (1, 1, 24, 16), norm_eps=1e-3)),
    "transformers_clips": (
        "transformers",
        lambda: encoder_of(TemporalEncoder, (3, 4, 16, 16), position="vjepa2", depth=2),
    ),
    "onnx": ("onnx", lambda: encoder_of(SpatialEncoder, (3, 1, 16, 24))),
    "program_clips": ("torch_export", lambda: encoder_of(TemporalEncoder, (1, 4, 16, 24), position="rope")),
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder, to which the paths in snippets are relative."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("exports")
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def exports(workdir: Path) -> dict[str, tuple[Any, Exported]]:
    encoders = {name: (format, make()) for name, (format, make) in CASES.items()}
    return {n: (encoder, export_encoder(encoder, format, workdir / n)) for n, (format, encoder) in encoders.items()}


@pytest.fixture(scope="module")
def without_jepa(workdir: Path, exports: dict[str, tuple[Any, Exported]]) -> tuple[dict[str, dict[str, Tensor]], str]:
    """Tensors and output of the printed programs in a process that cannot import jepa."""
    for name, (_, done) in exports.items():
        (workdir / f"{name}.py").write_text(done.snippet)
    command = [sys.executable, "-I", "-c", RUN_SNIPPETS, *exports]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=workdir)
    assert result.returncode == 0, result.stderr
    return torch.load(workdir / "results.pt"), result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_printed_program_computes_our_tokens_without_our_package(name: str, exports, without_jepa) -> None:
    encoder, variables = exports[name][0], without_jepa[0][name]
    pixels = variables["images" if name.startswith("timm") else "pixels"]
    pixels = pixels.transpose(1, 2) if name == "transformers_clips" else pixels
    with torch.no_grad():
        torch.testing.assert_close(variables["tokens"], encoder(pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_timms_forward_is_the_mean_token(without_jepa) -> None:
    variables = without_jepa[0]["timm_wide"]
    torch.testing.assert_close(variables["features"], variables["tokens"].mean(1))


@pytest.mark.slow
def test_a_folder_is_loaded_without_missing_or_unexpected_tensors(without_jepa) -> None:
    assert not re.search("newly|missing|unexpected|mismatch", without_jepa[1], re.IGNORECASE)


@pytest.mark.parametrize(
    "architecture",
    ["vit_small_patch16_dinov3", "vit_base_patch16_siglip_224", "vit_base_patch16_224.mae", "vit_base_patch14_dinov2"],
)
def test_an_encoder_of_timm_goes_back_to_timm(architecture: str, tmp_path: Path) -> None:
    """With registers and rotary positions, a pooling layer of its own, a norm after pooling, layer scale."""
    torch.manual_seed(0)
    small = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8}
    encoder: Any = TimmEncoder(clip_shape=(3, 1, 16, 24), architecture=architecture, arguments=small).eval()
    encoder.transform = EvalTransform(image_size=(16, 24), mean=[0.5] * 3, std=[0.5] * 3)
    done = export_encoder(encoder, "timm", tmp_path / "x")
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(timm_export.load(done.folder)(images), encoder(images))
    assert export_encoder(open_encoder(f"timm:local-dir:{done.folder}"), "safetensors", tmp_path / "y").difference == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "program_clips"])
def test_a_program_takes_any_batch_size(name: str, exports) -> None:
    encoder, done = exports[name]
    implementation = export_format(CASES[name][0])
    pixels = torch.randn(5, *implementation.input_shape(encoder), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(implementation.load(done.folder)(pixels), encoder(pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_programs_contain_no_paths_of_the_machine(exports) -> None:
    for name in ("onnx", "program_clips"):
        written = b"".join(path.read_bytes() for path in exports[name][1].folder.iterdir())
        assert str(Path(export.__file__).parent).encode() not in written


@pytest.mark.slow
def test_processors_do_what_our_transform_does(exports) -> None:
    from transformers import AutoImageProcessor, AutoVideoProcessor

    generator = torch.Generator().manual_seed(2)
    image = torch.randint(0, 256, (1, 3, 30, 30), generator=generator, dtype=torch.uint8)
    clip = torch.randint(0, 256, (1, 4, 3, 30, 30), generator=generator, dtype=torch.uint8)
    of_images, of_clips = (exports[f"transformers_{kind}"] for kind in ("images", "clips"))
    tolerance = {"atol": 1.01 / 255 / 0.2, "rtol": 0}  # one grey level
    theirs = AutoImageProcessor.from_pretrained(of_images[1].folder)(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(theirs, of_images[0].transform(image)[:, :, 0], **tolerance)
    processor = AutoVideoProcessor.from_pretrained(of_clips[1].folder)
    theirs = processor([clip[0]], return_tensors="pt")["pixel_values_videos"]
    torch.testing.assert_close(theirs.transpose(1, 2), of_clips[0].transform(clip.transpose(1, 2)), **tolerance)


@pytest.mark.slow
def test_timm_gets_the_statistics_of_the_pixels(exports) -> None:
    config = json.loads((exports["timm_frames"][1].folder / "config.json").read_text())["pretrained_cfg"]
    assert (config["mean"], config["std"], config["input_size"]) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.25], [3, 16, 16])


def test_a_wrong_export_leaves_earlier_files_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(SpatialEncoder, (3, 1, 16, 16))
    folder = export_encoder(encoder, "timm", tmp_path / "old").folder
    before = {path.name: path.stat().st_size for path in folder.iterdir()}
    rename = timm_export.to_foreign

    def slightly_wrong(*arguments: Any) -> dict[str, Tensor]:
        tensors = rename(*arguments)
        return tensors | {"blocks.0.mlp.fc1.bias": tensors["blocks.0.mlp.fc1.bias"] + 0.01}

    monkeypatch.setattr(timm_export, "to_foreign", slightly_wrong)
    for name in ("old", "new"):
        with pytest.raises(RunError, match="differ by"):
            export_encoder(encoder, "timm", tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == before


def test_a_failed_write_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(timm_export, "write_json", full)
    with pytest.raises(RunError, match="No space left"):
        export_encoder(encoder_of(SpatialEncoder, (3, 1, 16, 16)), "timm", tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("format", "encoder", "reason"),
    [
        ("timm", encoder_of(TemporalEncoder, (3, 4, 16, 16)), "use onnx or torch_export"),
        ("transformers", encoder_of(TemporalEncoder, (3, 4, 16, 16)), "encoder.position=vjepa2"),
        ("transformers", encoder_of(TemporalEncoder, (3, 4, 16, 24), position="vjepa2"), "16x24"),
        ("timm", encoder_of(SpatialEncoder, (3, 1, 16, 16), depth=0), "no blocks"),
        ("transformers", encoder_of(SpatialEncoder, (3, 1, 16, 16), depth=0), "use onnx or torch_export"),
        ("pickle", encoder_of(SpatialEncoder, (3, 1, 16, 16)), "valid: safetensors, timm"),
    ],
)
def test_an_unsupported_encoder_is_refused_with_an_alternative(
    format: str, encoder: Any, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        export_encoder(encoder, format, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    encoder = encoder_of(SpatialEncoder, (3, 1, 16, 16))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    export_encoder(encoder, "timm", tmp_path / "export")
    export_encoder(encoder_of(SpatialEncoder, (1, 1, 16, 16)), "timm", tmp_path / "export")
    assert '"in_chans": 1' in (tmp_path / "export" / "config.json").read_text()
    (tmp_path / "export" / "notes.txt").write_text("of mine")
    for name, file in {"mine": "thesis.txt", "export": "notes.txt"}.items():
        with pytest.raises(ConfigError, match=name):
            export_encoder(encoder, "timm", tmp_path / name)
        assert (tmp_path / name / file).exists()


def run_folder(tmp_path: Path) -> Path:
    """A run folder with the files that provenance is read from."""
    last = tmp_path / "outputs" / "shapes-run" / "checkpoints" / "last"
    last.mkdir(parents=True)
    config = {
        "name": "shapes-run", "seed": 7, "batch_size": 32, "lr": 1e-3,
        "encoder": {"weights": "/home/me/private/published.pt"},
        "objective": {"_target_": "jepa.objectives.jepa.JEPA"},
        "mask": {"_target_": "jepa.masks.block.BlockMask"},
        "optimizer": {"_target_": "torch.optim.AdamW"},
        "dataset": {"_target_": "jepa.data.images.ImageFolder", "root_path": "/home/me/private"},
    }  # fmt: skip
    (last / "config.yaml").write_text(yaml.safe_dump(config))
    data = {"num_samples": 4321, "classes": ["cat", "a|b", *map(str, range(30))], "digest": "0"}
    (last / "state.json").write_text(json.dumps({"format": FORMAT, "step": 50, "data": data, "digests": {}}))
    origin = {"device": "CPU", "versions": {"torch": "2.0"}, "sessions": [{"started": 1e9, "from_step": 0}]}
    (last.parents[1] / "provenance.json").write_text(json.dumps(origin))
    rows = [
        {"step": 0, "probe/knn_top1": 11.1},
        {"step": 50, "probe/knn_top1": 44.4},
        {"step": 60, "probe/knn_top1": 55.5},
    ]
    (last.parents[1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return last.parents[1]


def test_provenance_says_how_the_checkpoint_was_trained_and_no_path(tmp_path: Path) -> None:
    provenance = read_provenance(str(run_folder(tmp_path)))
    text = " ".join([provenance.name, *provenance.facts.values(), provenance.results])
    words = ("shapes-run", "step 50", "1,600", "JEPA", "ImageFolder", "published.pt", "11.1", "44.4")
    words += ("4,321 samples in 32 classes (cat, a\\|b, 0, 1,", "17, ...)", "begun 2001-09-09, on CPU", "torch 2.0")
    assert [word for word in words if word not in text] == []
    assert "55.5" not in text
    assert "private" not in text


def test_card_says_what_it_is_and_how_to_load_it_from_the_folder(exports) -> None:
    done = exports["timm_frames"][1]
    text = (done.folder / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == "timm"
    assert 'timm.create_model("local-dir:."' in text
    assert all(word in text for word in ("0.5, 0.4, 0.3", "16 x 16 pixels", f"{done.difference:.1e}", "Licence"))
    assert str(done.folder) not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("timm_wide", 'create_model("hf-hub:me/encoder"'),
        ("transformers_wide", 'from_pretrained("me/encoder")'),
        ("onnx", 'InferenceSession("./model.onnx")'),
    ],
)
def test_card_of_a_repository_loads_from_there_if_the_library_can(name: str, call: str, exports) -> None:
    encoder, done = exports[name]
    implementation = export_format(CASES[name][0])
    assert call in card(encoder, implementation, read_provenance(str(done.folder)), done.difference, "me/encoder")


def test_no_fact_of_a_run_becomes_markup_or_a_column_of_the_card(exports) -> None:
    encoder, done = exports["timm_wide"]
    text = card(encoder, export_format("timm"), Provenance("x", {"data set": HOSTILE}, ""), done.difference, None)
    (line,) = [line for line in text.splitlines() if line.startswith("| data set")]
    assert line.replace("\\|", "").count("|") == 3
    assert "<" not in line


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["format=tim"], 'did you mean "timm"?; valid: safetensors, timm, transformers, onnx, torch_export'),
        (["run=outputs/shapes-rum"], "outputs/shapes-rum does not exist"),
        (["run=timm:vit_tiny_patch16_224"], "give output=FOLDER"),
        (["output=outputs"], "outputs is not empty and not from jepa-export"),
        (["push_to_hub=my encoder"], "OWNER/NAME"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_opened(
    overrides: list[str], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        compose_export(["run=outputs/shapes-run", *overrides])
    assert len(caught.value.errors) == 1
    assert fault in caught.value.errors[0]


@pytest.fixture(scope="module")
def source(workdir: Path) -> str:
    """Source of an encoder for the command."""
    encoder = encoder_of(SpatialEncoder, (3, 1, 16, 16))
    encoder.node = {"_target_": "jepa.encoders.spatial.SpatialEncoder", "clip_shape": [3, 1, 16, 16], **SIZES}
    return export_encoder(encoder, "safetensors", workdir / "source").snippet.split('"')[1]


def test_our_own_folder_is_what_the_printed_program_loads(source: str) -> None:
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(open_encoder(source)(pixels), encoder_of(SpatialEncoder, (3, 1, 16, 16))(pixels))


def test_command_says_what_it_wrote_how_well_and_how_to_load_it(source: str, workdir: Path, capsys) -> None:
    assert main([f"run={source}", "format=timm", "output=deploy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "deploy: README.md" in lines[0]
    assert "model.safetensors" in lines[0]
    assert "difference" in lines[1]
    space: dict[str, Any] = {}
    exec("\n".join(lines[2:]), space)
    assert space["tokens"].shape == (2, 4, 24)


def test_command_fails_in_one_sentence_if_parity_fails(source: str, workdir: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    assert main([f"run={source}", "format=timm", "output=broken"]) == 1
    assert re.fullmatch(r"jepa-export: format=timm: .* nothing was kept\n", capsys.readouterr().err)
    assert not (workdir / "broken").exists()


def test_command_refuses_with_status_2_and_explains_every_key(source: str, workdir: Path, capsys) -> None:
    (workdir / "mine").write_text("")
    assert main([f"run={source}", "format=tim", "output=mine"]) == 2
    printed = capsys.readouterr().err
    assert all(word in printed for word in ("2 errors", 'did you mean "timm"?', "mine is a file"))
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    keys = yaml.safe_load((conf_folder() / "export.yaml").read_text()).keys() - {"defaults"}
    assert all(re.search(rf"^  {key}=\S+ +\w", printed, re.MULTILINE) for key in keys)


@pytest.mark.slow
def test_without_a_network_the_folder_stays_and_the_reason_is_printed(exports) -> None:
    folder = exports["timm_frames"][1].folder
    with pytest.raises(RunError, match="hf upload me/encoder"):
        push_to_hub(folder, "me/encoder")
    assert (folder / "model.safetensors").exists()


@pytest.mark.slow
def test_a_new_repository_is_private_and_gets_the_whole_folder(exports, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    class Hub:
        def create_repo(self, name: str, **options: Any) -> str:
            calls.append({"name": name} | options)
            return f"hub/{name}"

        def upload_folder(self, **options: Any) -> None:
            calls.append(options)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    folder = exports["timm_frames"][1].folder
    assert push_to_hub(folder, "me/encoder") == "hub/me/encoder"
    assert calls[0]["private"]
    assert (calls[1]["repo_id"], calls[1]["folder_path"]) == ("me/encoder", folder)
