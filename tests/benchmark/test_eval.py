"""jepa-eval as a command: its table and files, what it does not repeat, what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile_text import HOSTILE, count_as_text
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from tiny_agent import agent

from jepa.benchmark.protocol import Benchmark
from jepa.benchmark.report import html, markdown, terminal
from jepa.benchmark.results import Results, Row
from jepa.cli.eval import main
from jepa.errors import RunError
from jepa.evaluation.samples import Samples
from jepa.reports.statistics import wilson

QUICK = [
    "num_workers=0", "dataset.num_samples=80", "dataset.val_samples=40", "evaluator.finetune.epochs=1",
    "evaluator.finetune.batch_size=40", "evaluator.attentive.epochs=1", "device=cpu", "precision=fp32",
]  # fmt: skip
EVERY = ["run=outputs/first", "task=[knn,linear,attentive,finetune]", "seeds=2", "floors=[pixels,untrained]"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run of two steps, outputs/first, and its results of jepa-eval, outputs/eval-shapes."""
    folder = tmp_path_factory.mktemp("eval")
    agent(folder / "outputs" / "first", "steps=2", "evaluator=[]").train()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*EVERY, *QUICK]) == 0
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def rows_of(name="eval-shapes"):
    return {
        (row["title"], row["column"]): row for row in json.loads(Path(f"outputs/{name}/eval.json").read_text())["rows"]
    }


def test_the_table_has_what_each_representation_offers(here):
    columns = ["kNN", "linear", "attentive", "fine-tuned"]
    expected = [("pixels", c) for c in columns[:2]] + [(title, c) for title in ("untrained", "first") for c in columns]
    assert list(rows_of()) == expected
    text = Path("outputs/eval-shapes/eval.md").read_text()
    assert "| pixels |" in text
    head = next(line for line in text.splitlines() if line.startswith("|"))
    assert [cell.strip() for cell in head.split("|")[2:-1]] == columns


def test_every_row_says_how_it_came_about(here):
    text = Path("outputs/eval-shapes/eval.md").read_text()
    for words in (
        "80 training samples; 40 test samples of the held-out part", "averaged over the sample", "resized to 32x32",
        "raw pixels", "L-BFGS", "chosen on 20%", "AdamW", "crops: scale [0.3, 1.0]", "metric: top-1", "seeds 0 to 1",
    ):  # fmt: skip
        assert words in text
    page = Path("outputs/eval-shapes/eval.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "Confusion" in page
    for row in rows_of().values():
        assert (row["low"], row["high"]) == pytest.approx([100 * end for end in wilson(row["top1"] / 100, 40)])


def test_what_is_random_is_repeated_and_the_rest_is_not(here):
    seeds = {place: [trial["seed"] for trial in row["trials"]] for place, row in rows_of().items()}
    assert seeds["first", "kNN"] == seeds["pixels", "linear"] == [0]
    assert seeds["first", "attentive"] == seeds["first", "fine-tuned"] == seeds["untrained", "kNN"] == [0, 1]


def features_of(bench, title):
    source = next(one for one in bench.entries if one.title == title)
    bench.cache.folder = Path("outputs/eval-shapes/features")
    representation = bench.open(source, 0)
    return [bench.cache.features(title, representation, part) for part in bench.splits[:2]]


@pytest.mark.parametrize("title", ["pixels", "first"])
def test_knn_and_linear_are_those_of_sklearn_on_the_kept_features(here, title, monkeypatch):
    from jepa.config import compose_eval

    bench = Benchmark(compose_eval([*EVERY, *QUICK]))
    monkeypatch.setattr(Samples, "batches", None)  # only what is kept
    (x, y), (u, v) = ((part.vectors.double().numpy(), part.labels.numpy()) for part in features_of(bench, title))
    near = KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine", algorithm="brute")
    assert rows_of()[title, "kNN"]["top1"] == pytest.approx(100 * near.fit(x, y).score(u, v), abs=100 / 40 + 1e-6)
    row = rows_of()[title, "linear"]
    mean, deviation = x.mean(0), np.maximum(x.std(0), 1e-6)
    x, u = (x - mean) / deviation, (u - mean) / deviation
    model = LogisticRegression(C=1 / (80 * row["trials"][0]["chosen"]["l2"]), max_iter=5000).fit(x, y)
    assert row["top1"] == pytest.approx(100 * model.score(u, v), abs=100 / 40 + 1e-6)


def test_the_same_command_again_encodes_and_trains_nothing(here, monkeypatch):
    before = Path("outputs/eval-shapes/eval.json").read_text()
    monkeypatch.setattr(Samples, "batches", None)
    monkeypatch.setattr(Benchmark, "_trial", None)
    assert main([*EVERY, *QUICK]) == 0
    assert Path("outputs/eval-shapes/eval.json").read_text() == before


def test_another_task_uses_the_features_and_joins_the_table(here, monkeypatch):
    shutil.copytree("outputs/eval-shapes", "outputs/joined")
    before = rows_of("joined")
    monkeypatch.setattr(Samples, "batches", None)
    sgd = ["evaluator.linear_sgd.epochs=2", "solver=sgd", "task=linear", "floors=[pixels]", "run=outputs/first"]
    assert main([*sgd, *QUICK, "name=joined"]) == 0
    after = rows_of("joined")
    assert after.keys() - before.keys() == {("pixels", "linear SGD"), ("first", "linear SGD")}
    assert set(after["first", "linear SGD"]["trials"][0]["chosen"]) == {"lr", "weight_decay"}


def test_columns_on_other_data_say_so(here):
    shutil.copytree("outputs/eval-shapes", "outputs/fewer")
    assert main(["run=outputs/first", "task=knn", "floors=[]", "train_samples=60", *QUICK, "name=fewer"]) == 0
    lines = Path("outputs/fewer/eval.md").read_text().splitlines()
    whole, fewer = (next(line for line in lines if line.startswith(f"- data: {n} training")) for n in (80, 60))
    assert whole.endswith(" [kNN, linear, attentive, fine-tuned]")
    assert fewer.endswith(" [kNN, of 60]")


def test_a_change_of_protocol_measures_anew(here):
    shutil.copytree("outputs/eval-shapes", "outputs/changed")
    before, command = rows_of("changed"), ["run=outputs/first", "task=knn", "floors=[]", *QUICK, "name=changed"]
    assert main([*command, "evaluator.knn.k=1"]) == 0
    assert rows_of("changed")["first", "kNN"]["key"] != before["first", "kNN"]["key"]
    assert main([*command, "shots=2", "seeds=2"]) == 0
    assert rows_of("changed")["first", "kNN, 2 per class"]["deviation"] is not None
    assert main([*command, "shots=0.25"]) == 0
    assert ("first", "kNN, 25 %") in rows_of("changed")


def test_results_on_other_test_samples_are_not_mixed(here, capsys):
    assert main(["run=outputs/first", "task=knn", *QUICK, "test_samples=10"]) == 1
    assert "outputs/eval-shapes holds results on other test samples" in capsys.readouterr().err


def test_a_stop_keeps_the_rows_that_are_done(here, monkeypatch, capsys):
    shutil.copytree("outputs/eval-shapes/features", "outputs/stopped/features")
    trial, calls = Benchmark._trial, []

    def interrupted(self, *arguments):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return trial(self, *arguments)

    monkeypatch.setattr(Benchmark, "_trial", interrupted)
    command = ["run=outputs/first", "floors=[]", *QUICK, "name=stopped"]
    assert main(command) == 130
    assert list(rows_of("stopped")) == [("first", "kNN")]
    assert main(command) == 0
    assert len(calls) == 3


def test_an_inspection_is_written(here):
    assert main(["run=outputs/first", "task=inspect", *QUICK]) == 0
    assert "Feature maps" in Path("outputs/eval-shapes/inspect.html").read_text()


def test_an_image_folder_without_classes_is_refused_in_one_sentence(here, capsys):
    Path("plain/train").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(f"plain/train/{number}.png")
    data = ["dataset=imagefolder", "dataset.root_path=plain"]
    assert main(["run=outputs/first", "task=knn", "num_workers=0", *data]) == 2
    assert "has a label" in capsys.readouterr().err
    assert main(["run=outputs/first", "task=knn", "num_workers=0", *data, "dataset.channels=1"]) == 2


def test_other_channels_are_refused_by_the_key(here, capsys):
    for name in ("train", "test"):
        for label in "ab":
            Path(f"grey/{name}/{label}").mkdir(parents=True)
            for number in range(2):
                Image.new("L", (8, 8), number).save(f"grey/{name}/{label}/{number}.png")
    data = ["dataset=imagefolder", "dataset.root_path=grey", "num_workers=0"]
    assert main(["run=outputs/first", "task=knn", *data, "dataset.channels=1"]) == 2
    assert "dataset.channels: first reads 3 channels, the pictures have 1" in capsys.readouterr().err


def test_clips_are_judged_frame_by_frame_and_say_so(here):
    clips = ["dataset=moving_digits", "num_frames=2", "dataset.num_samples=30", "dataset.val_samples=10"]
    assert main(["run=outputs/first", "task=[knn,finetune]", *QUICK[3:], *clips, "num_workers=0", "readout=steps"]) == 0
    text = Path("outputs/eval-moving_digits/eval.md").read_text()
    assert "2 frames" in text
    assert "it was trained on 1 frames" in text
    assert {title for title, _ in rows_of("eval-moving_digits")} >= {"pixels", "untrained", "first"}


def test_hog_is_left_out_by_name_without_scikit_image(here, monkeypatch, caplog):
    monkeypatch.setattr("jepa.benchmark.protocol.find_spec", lambda name: None)
    assert main(["run=outputs/first", "task=knn", "floors=[hog]", *QUICK]) == 0
    assert ("hog", "kNN") not in rows_of()
    monkeypatch.setitem(sys.modules, "skimage", None)
    from jepa.benchmark.features import hog

    with pytest.raises(RunError, match=r"jepa-train\[eval\]"):
        hog(torch.zeros(1, 3, 1, 32, 32, dtype=torch.uint8))


def test_features_are_kept_as_safetensors_and_only_where_wanted(here):
    files = list(Path("outputs/eval-shapes/features").glob("*.safetensors"))
    assert all(set(load_file(path)) in ({"vectors", "rows"}, {"tokens"}) for path in files)
    assert main(["run=outputs/first", "task=knn", "floors=[]", *QUICK, "name=without", "cache=false"]) == 0
    assert not Path("outputs/without/features").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=atentive"], 'did you mean "attentive"?'),
        (["task=[]"], "names nothing"),
        (["floors=[pixel]"], 'did you mean "pixels"?'),
        (["run=outputs/frist"], 'did you mean "outputs/first"?'),
        (["run=untrained"], "untrained is the architecture of a run"),
        (["run=pixels"], "image_size must be given"),
        (["run=pixels", "image_size=32", "task=finetune"], "finetune needs an encoder"),
        (["shots=1.5"], "a whole number of samples per class"),
        (["shots=0"], "a share above 0"),
        (["layers=0"], "must be at least 1"),
        (["readout=max"], "valid: mean, mean_std, steps, grid2, layers, tokens, cls"),
        (["solver=adam"], "valid: lbfgs, sgd"),
        (["augment.flp=true"], 'did you mean "augment.flip"?'),
        (["evaluator=[knn]"], "evaluator=linear is not among those chosen"),
        (["num_frames=4"], "Shapes delivers images"),
    ],
)
def test_what_cannot_be_is_refused_by_name(here, overrides, message, capsys):
    assert main(["run=outputs/first", *overrides]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_refusals_and_help_come_without_torch(tmp_path):
    program = (
        "import sys; from jepa.cli.eval import main; assert main(['run=no', 'task=x']) == 2; assert main(['-h']) == 0"
    )
    check = "assert not {'torch', 'timm'} & set(sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", f"{program}; {check}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "shots=null" in result.stdout
    assert "evaluator=" in result.stdout


def test_results_and_every_class_come_first_and_the_protocol_is_folded(tmp_path):
    names = [f"class {number}" for number in range(40)]
    row = Row(
        title="a", column="kNN", key="", top1=50.0, low=40.0, high=60.0, deviation=None, balanced=None, num_test=80,
        per_class=[50.0] * 40, confusion=None, trials=[{"chosen": {}}], settings={}, protocol=["probe: by kNN"],
        seconds={"probe": 1.0},
    )  # fmt: skip
    facts = {"classes": names, "warnings": [], "versions": {}, "data": "Birds, 80 test samples"}
    page = html(Results(tmp_path / "x", facts, {("a", "kNN"): row}))
    order = [page.index(text) for text in ("Birds, 80", "50.0 (40.0-60.0)", "class 0<", "<details>", "probe: by kNN")]
    assert order == sorted(order)
    assert all(f"<th>{name}</th>" in page for name in names)
    assert "Confusion" not in page


def test_no_name_of_a_class_a_run_or_a_package_becomes_markup(tmp_path):
    row = Row(
        title=HOSTILE, column=HOSTILE, key="", top1=50.0, low=40.0, high=60.0, deviation=1.0, balanced=50.0, num_test=4,
        per_class=[50.0, None], confusion=[[1, 1], [0, 0]], trials=[{"chosen": {HOSTILE: 1.0}}], settings={},
        protocol=[f"probe: {HOSTILE}"], seconds={HOSTILE: 1.0},
    )  # fmt: skip
    facts = {"classes": [HOSTILE, "b"], "warnings": [HOSTILE], "versions": {HOSTILE: HOSTILE}}
    results = Results(tmp_path / "a&<b>", facts, {(HOSTILE, HOSTILE): row})
    page = html(results)
    # table 3; protocol 2; by class 3; confusion 2 + 3; chosen 4; versions 2
    assert count_as_text(page) == 19
    assert count_as_text(page, "a&<b>") == 2
    tables = [line for line in markdown(results).splitlines() if line.startswith("|")]
    assert [line.replace("\\|", "").count("|") for line in tables] == [4, 4, 4]
    assert not any("<" in line for line in tables)
    assert terminal(results).splitlines()[1].startswith(HOSTILE)
