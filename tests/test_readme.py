"""Every command in the README and in the guides runs; trainings are shrunk by overrides that are appended to them."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from synthetic_run import write_run
from tiny_world import TINY, train_world

from jepa.cli.collect import main as collect
from jepa.cli.compare import main as compare
from jepa.cli.embed import main as embed
from jepa.cli.eval import main as judge
from jepa.cli.export import main as export
from jepa.cli.find import main as find
from jepa.cli.finetune import main as finetune
from jepa.cli.plan import main as plan
from jepa.cli.play import main as play
from jepa.cli.predict import main as predict
from jepa.cli.rl import main as learn
from jepa.cli.train import main as train
from jepa.comparison.runs import TrainProcesses
from jepa.config import Composer, compose_rl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
BLOCKS = [
    block
    for page in PAGES
    for block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
]
SHELL_LINES = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines() if line.strip()]
PLANNED = ["episodes=2", "budget=4", "baselines=[random]", "videos=1", "planner.samples=8", "planner.elites=4"]
DREAMT = [
    "world_steps=6",
    "policy_steps=4",
    "env_steps=100",
    "eval_episodes=2",
    "videos=1",
    "batch_size=8",
    "horizon=2",
]
DREAMT += ["episode_steps=8", "ppo_steps=[1]"]
WORLD = ["evaluator=[]", "batch_size=8"]
PYTHON_BLOCKS = [block for kind, block in BLOCKS if kind == "python"]


def run(command: list[str], cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """A finished run for the commands that need one."""
    folder = tmp_path_factory.mktemp("trained")
    output_of(train, shrunk(["experiment=quickstart"], tiny), folder)
    return folder / "outputs" / "quickstart"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished world model of Two Rooms."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_world("two_rooms")
    return folder / "outputs" / "two_rooms"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of jepa-rl."""
    pytest.importorskip("minigrid")
    folder = tmp_path_factory.mktemp("policy")
    jepa_rl(["rl=minigrid_jepa"], [], folder)
    return folder / "outputs" / "minigrid_jepa"


@pytest.fixture(scope="module")
def tuned(quickstart: Path, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two classes that was fine-tuned from the quickstart."""
    folder = tmp_path_factory.mktemp("tuned")
    write_pictures(folder)
    data = ["dataset=imagefolder", "dataset.root_path=data", "dataset.val_folder=test"]
    jepa_finetune([f"run={quickstart}", *data, "name=tuned"], tiny, folder)
    return folder / "outputs" / "tuned"


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with what the commands expect to find."""
    write_boxes(tmp_path / "voc")
    for number in range(6):
        write_video(tmp_path / "videos" / "train" / ("left" if number % 2 == 0 else "right") / f"{number}.mp4", number)
    write_pictures(tmp_path)
    return tmp_path


def write_pictures(folder: Path) -> None:
    """Noise of two classes, in folder/data."""
    for number in range(16):
        part, kind = "test" if number > 11 else "train", "dog" if number % 2 == 0 else "cat"
        path = folder / "data" / part / kind / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((48, 40), 20.0 * number).convert("RGB").save(path)


def write_boxes(root: Path) -> None:
    """Pictures with one box each, in the layout of Pascal VOC."""
    box = "<xmin>8</xmin><ymin>8</ymin><xmax>30</xmax><ymax>28</ymax>"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for number in range(8):
        Image.effect_noise((48, 40), 30.0 * number).convert("RGB").save(root / "JPEGImages" / f"{number}.jpg")
        text = f"<annotation><object><name>cell</name><bndbox>{box}</bndbox></object></annotation>"
        (root / "Annotations" / f"{number}.xml").write_text(text)
    (root / "ImageSets/Main/train.txt").write_text("".join(f"{number}\n" for number in range(6)))
    (root / "ImageSets/Main/val.txt").write_text("6\n7\n")


def write_video(path: Path, brightness: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(40):
            pixels = np.full((32, 48, 3), 20 * brightness + number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def write_parquet(path: Path) -> None:
    import datasets

    images = sorted(path.parent.rglob("*.jpg"))
    columns = {"image": [str(image) for image in images], "label": [number % 2 for number in range(len(images))]}
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).to_parquet(str(path))


def shrunk(arguments: list[str], tiny: list[str]) -> list[str]:
    quiet = [] if any(argument.startswith("logger=") for argument in arguments) else ["logger=none"]
    return [*arguments, *tiny, *quiet]


def output_of(main: Callable[[list[str]], int], arguments: list[str], cwd: Path) -> str:
    """Output of a command that runs in this process, since importing torch takes longer than the training."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["jepa-train"])
        assert main(arguments) == 0, printed.getvalue()
    return printed.getvalue()


def projects(arguments: list[str]) -> bool:
    presets = [text.partition("=")[2] for text in arguments if text.startswith("experiment=")]
    texts = [(ROOT / "conf" / "experiment" / f"{preset}.yaml").read_text() for preset in presets]
    return any("override /predictor: projector" in text for text in texts)


def jepa_train(arguments: list[str], tiny: list[str], cwd: Path) -> None:
    command = [str(Path(sys.executable).parent / "jepa-train")]
    if {"--help", "-sc"} & set(arguments):
        assert run([*command, *arguments], cwd)
    elif "estimate=true" in arguments:
        shared = ["batch_size=8" if text.startswith("batch_size=") else text for text in tiny]
        assert "calculated, not measured" in output_of(train, [*arguments, *shared], cwd)
    elif "experiment=cifar10_vit_tiny" in arguments:  # would download the data: its configuration alone is checked
        assert "cifar10" in run([*command, *arguments, "--cfg", "job"], cwd)
    elif "processes=2" in arguments:  # the tests of two ranks start this very command
        assert Composer().check(shrunk(arguments, tiny)).errors == []
    else:
        if parquet := [text.partition("=")[2] for text in arguments if text.endswith(".parquet")]:
            write_parquet(cwd / parquet[0])
        other = ("encoder.",) if "encoder=pretrained" in arguments else ()
        other += ("predictor.",) if projects(arguments) else ()  # a projector has no such keys
        sized = [text for text in tiny if not text.startswith(other)]
        shrunken = [re.sub("^(lr=[^,]+),.*", r"\1", text) for text in shrunk(arguments, sized)]
        if (
            "hydra/launcher=local" in arguments
        ):  # in this process; tests/cli/test_sweeps.py starts others beside each other
            shrunken.append("hydra.launcher.n_jobs=1")
        output_of(train, shrunken, cwd)
        reports = {path.parent for path in (cwd / "outputs").rglob("report.html")}
        begun_from = {cwd / text.partition("=")[2] for text in arguments if text.startswith("encoder.weights=")}
        num_members = 2 if "--multirun" in arguments else 1
        assert len(reports - begun_from) == num_members


def torchrun(arguments: list[str], tiny: list[str], cwd: Path) -> None:
    program = arguments.index("jepa-train")
    jepa = str(Path(sys.executable).parent / "jepa-train")
    run(
        [
            str(Path(sys.executable).parent / "torchrun"),
            *arguments[:program],
            jepa,
            *shrunk(arguments[program + 1 :], tiny),
        ],
        cwd,
    )
    assert len(list((cwd / "outputs").rglob("report.html"))) == 1


def train_here(_: TrainProcesses, overrides: Sequence[str], output: Path) -> tuple[int, list[str]]:
    """As TrainProcesses.train, without a process of its own, which the tests of jepa-compare start."""
    return train(overrides), []


def jepa_compare(arguments: list[str], tiny: list[str], cwd: Path) -> None:
    """Two existing runs are generated; of a comparison that trains, two runs are trained."""
    is_given = any("=" in text for text in arguments)
    arguments = [re.sub(r"^(objective=\w+,\w+),.*", r"\1", text) for text in arguments]
    if not is_given:
        for name in ("jepa", "mae"):
            write_run(cwd / arguments[0] / f"objective={name}", steps=4, log_every=2, eval_every=2, pictures=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainProcesses, "train", train_here)
        printed = output_of(compare, shrunk(arguments, tiny) if is_given else arguments, cwd)
    assert "untrained encoder" in printed
    assert len(list((cwd / "outputs").rglob("compare.html"))) == 1


def jepa_find(arguments: list[str], tiny: list[str], cwd: Path) -> None:
    batch = [text for text in tiny if not text.startswith("batch_size=")]
    steps = ["--steps", "12", *tiny] if arguments[0] == "lr" else batch
    assert "  jepa-train experiment=quickstart" in output_of(find, [*arguments, *steps], cwd)


def make_target(arguments: list[str], tiny: list[str], cwd: Path) -> None:
    """Not run, since this test is part of `make test`: the target exists and its recipe expands."""
    recipe = run(["make", "-n", *arguments], ROOT)
    assert {"train": "experiment=quickstart", "test": "pytest", "plan": "experiment=two_rooms"}[arguments[0]] in recipe


def submit(arguments: list[str], tiny: list[str], cwd: Path) -> None:
    """The script itself is submitted by the Slurm test; here its arguments are checked."""
    script, *overrides = arguments
    assert (ROOT / script).exists()
    if script == "scripts/rl.sbatch":
        assert compose_rl(overrides).rounds > 1
        return
    (folder,) = [text.partition("=")[2] for text in overrides if text.startswith("dataset.root_path=")]
    overrides = [text.replace(folder, str(cwd / "data")) for text in overrides]
    run([sys.executable, "-m", "jepa.cli.train", *overrides, "dataset.val_folder=null", "--cfg", "job"], cwd)


def activate(arguments: list[str], tiny: list[str], cwd: Path) -> None:
    venv = re.search(r"^VENV := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert venv
    assert arguments == [f"{venv[1]}/bin/activate"]


def evaluate(arguments: list[str], tiny: list[str], cwd: Path) -> None:
    inner = re.fullmatch(r"\$\((.*)\)", arguments[0])
    assert inner
    script = run(["bash", "-c", f"PATH={Path(sys.executable).parent}:$PATH; {inner[1]}"], cwd)
    assert "complete" in script
    run(["bash", "-n", "-c", script], cwd)


def jepa_eval(arguments: list[str], tiny: list[str], cwd: Path) -> None:
    """With few samples, and one epoch of fine-tuning."""
    few = ["train_samples=64", "test_samples=32", "num_workers=0", "evaluator.finetune.epochs=1", "floors=[pixels]"]
    printed = output_of(judge, [*arguments, *few], cwd)
    assert ("inspect.html" if "task=inspect" in arguments else "raw pixels") in printed
    assert list((cwd / "outputs").rglob("eval.html")) or list((cwd / "outputs").rglob("inspect.html"))


def jepa_finetune(arguments: list[str], tiny: list[str], cwd: Path) -> None:
    sizes = ("encoder", "predictor", "image_size", "dataset", "evaluation")
    smaller = ["objective.width=32", "objective.regions=16"] if "objective=detect" in arguments else []
    printed = output_of(
        finetune, shrunk(arguments, [text for text in tiny if not text.startswith(sizes)] + smaller), cwd
    )
    assert "step 2" in printed


def jepa_predict(arguments: list[str], tiny: list[str], cwd: Path) -> None:
    assert "16 files" in output_of(predict, [*arguments, "num_workers=0"], cwd)
    assert "cat/13.jpg," in (cwd / "predictions.csv").read_text()
    assert len(list((cwd / "drawn").rglob("*.png"))) == 16


def jepa_embed(arguments: list[str], tiny: list[str], cwd: Path) -> None:
    printed = output_of(embed, [*arguments, "num_workers=0"], cwd)
    assert "16 rows" in printed
    assert ("train/cat/1.jpg  1.0000" in re.sub(" +", "  ", printed)) == ("like=" in str(arguments))


def jepa_export(arguments: list[str], tiny: list[str], cwd: Path) -> None:
    assert "from_pretrained" in output_of(export, arguments, cwd)
    assert (cwd / "outputs" / "quickstart" / "export" / "transformers" / "config.json").is_file()


def jepa_plan(arguments: list[str], tiny: list[str], cwd: Path) -> None:
    if "experiment=two_rooms" in arguments:
        arguments = [*arguments, f"train=[{','.join(map(repr, TINY[1:]))}]", "encoders=[untrained]"]
    assert "is this latent plannable?" in output_of(plan, [*arguments, *PLANNED, "planner.horizon=4"], cwd)


def jepa_collect(arguments: list[str], tiny: list[str], cwd: Path) -> None:
    if "env=two_rooms" not in arguments:
        pytest.importorskip("minigrid")
    assert "frames/s" in output_of(collect, [*arguments, "episodes=2", "steps=3"], cwd)


def jepa_rl(arguments: list[str], tiny: list[str], cwd: Path) -> None:
    pytest.importorskip("minigrid")
    world = WORLD if "rl=minigrid_iris" in arguments else [*WORLD, "objective.head_steps=8"]
    arguments = [re.sub(r"^(seed=\d+,\d+),.*", r"\1", text) for text in arguments]
    printed = output_of(learn, [*arguments, *DREAMT, f"train=[{','.join(map(repr, world))}]"], cwd)
    assert all(f"\n{name}" in printed for name in ("random", *(["ppo"] if "ppo" in str(arguments) else [])))


def jepa_play(arguments: list[str], tiny: list[str], cwd: Path) -> None:
    assert "play.html" in output_of(play, [*arguments, "steps=3"], cwd)


RULES: dict[str, Callable[[list[str], list[str], Path], None]] = {
    "make": make_target,
    "jepa-train": jepa_train,
    "torchrun": torchrun,
    "jepa-compare": jepa_compare,
    "jepa-find": jepa_find,
    "jepa-eval": jepa_eval,
    "jepa-finetune": jepa_finetune,
    "jepa-predict": jepa_predict,
    "jepa-embed": jepa_embed,
    "jepa-export": jepa_export,
    "jepa-collect": jepa_collect,
    "jepa-plan": jepa_plan,
    "jepa-rl": jepa_rl,
    "jepa-play": jepa_play,
    "sbatch": submit,
    "source": activate,
    "eval": evaluate,
}


@pytest.mark.parametrize("line", SHELL_LINES, ids=lambda line: line.split("#")[0].strip())
def test_shell_command_works(
    line: str, tiny: list[str], workplace: Path, quickstart: Path, world: Path, request: pytest.FixtureRequest
) -> None:
    program, *arguments = shlex.split(line, comments=True)
    assert program in RULES, "no rule says how to test this command"
    if any(text.endswith("outputs/quickstart") for text in arguments):
        shutil.copytree(quickstart, workplace / "outputs" / "quickstart", symlinks=True)
    if any(text.endswith("=outputs/two_rooms") for text in arguments):
        shutil.copytree(world, workplace / "outputs" / "two_rooms", symlinks=True)
    if "run=outputs/tuned" in arguments:
        shutil.copytree(request.getfixturevalue("tuned"), workplace / "outputs" / "tuned", symlinks=True)
    if "run=outputs/minigrid_jepa" in arguments:
        policy = request.getfixturevalue("policy")
        shutil.copytree(policy, workplace / "outputs" / "minigrid_jepa", symlinks=True)
    RULES[program](arguments, tiny, workplace)


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=["use", "train", "attach", "act", "plan"])
def test_python_block_works(
    block: str, tiny: list[str], workplace: Path, quickstart: Path, world: Path, monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if "minigrid" in block:
        policy = request.getfixturevalue("policy")
        shutil.copytree(policy, workplace / "outputs" / "minigrid_jepa", symlinks=True)
    if "gymnasium" in block:
        pytest.importorskip("gymnasium")
        shutil.copytree(world, workplace / "outputs" / "two_rooms", symlinks=True)
    shutil.copytree(quickstart, workplace / "outputs" / "quickstart", symlinks=True)
    monkeypatch.chdir(workplace)
    sized = [text for text in tiny if "small_folder" not in block or not text.startswith("predictor.")]
    exec(block.replace("JEPAConfig()", f"JEPAConfig(*{shrunk([], sized)})"), {"__name__": "__main__"})


def test_two_commands_come_first() -> None:
    assert SHELL_LINES[:2] == ["make train", "make test"]


def test_every_block_and_link_is_covered() -> None:
    assert {kind for kind, _ in BLOCKS} <= {"bash", "python", ""}
    links = [page.parent / link for page in PAGES for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text())]
    assert not [link for link in links if not link.exists()]


def test_make_help_lists_every_target() -> None:
    listed = run(["make", "help"], ROOT)
    for target in ("train", "test", "quick", "setup", "lint", "docs", "bench", "gpu-check", "help"):
        assert f"make {target} " in listed


def test_gpu_check_says_so_where_there_is_no_gpu() -> None:
    command = ["make", "gpu-check", f"PYTHON={sys.executable}"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode != 0
    assert "no CUDA device" in result.stderr
