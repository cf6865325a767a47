"""jepa-predict: its table says what the fine-tuned run says, by the names of the classes, in pixels of the files."""

from __future__ import annotations

import contextlib
import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from used_run import Call, caller, run, train_runs, write_clip, write_two_classes
from voc_folder import write_voc, xml

from jepa import load_encoder, load_finetuned
from jepa.inference import finetuned
from jepa.inference.finetuned import Finetuned
from jepa.inference.predict import DRAWN_SIDE
from jepa.runs.checkpoint import CheckpointError
from jepa.runs.metrics import read_rows

pytestmark = pytest.mark.slow
TUNED, BOXES = "run=outputs/tuned", "run=outputs/boxes"
DETECTOR = [
    "objective=detect", "dataset=voc", "dataset.root_path=voc", "image_size=32", "objective.width=8", "steps=1",
    "objective.regions=16", "objective.score_threshold=0.0", "batch_size=4", "evaluator=[]", "logger=none",
    "dataset.test_split=null", "device=cpu", "num_workers=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures of two classes, a fine-tuned classifier and a detector that has hardly learned."""
    folder = tmp_path_factory.mktemp("trained")
    write_two_classes(folder / "pictures")
    images = {f"{number}": xml(("ant", 5, 6, 30, 30), ("bee", 30, 10, 50, 38)) for number in range(4)}
    write_voc(folder / "voc", images, {"train": [*images], "val": ["0"]})
    train_runs(folder, tuned=True)
    with contextlib.chdir(folder):
        run("finetune", "run=outputs/first", *DETECTOR, "name=boxes")
    return folder


@pytest.fixture
def predict(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    folder = shutil.copytree(trained, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(folder)
    return caller("predict", capfd)


def table(path: str = "predictions.csv") -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_accuracy_of_the_table_is_that_of_the_run(predict: Call) -> None:
    ended = predict(TUNED, "images=pictures/val", "top=2")
    assert ended.status == 0, ended.errors
    assert ended.output == "predictions.csv: 12 files\n"
    rows = table()
    assert [row["name"] for row in rows] == [f"{name}/{k:02}.png" for name in ("ant", "bee") for k in range(6)]
    hits = [row["class"] == row["name"].partition("/")[0] for row in rows]
    logged = next(row["probe/classifier_top1"] for row in reversed(read_rows(Path("outputs/tuned"))) if len(row) > 5)
    assert 100 * np.mean(hits) == pytest.approx(logged)
    assert logged > 50, "the classes can be told apart, so that the names can be exchanged"
    for row in rows:
        first, second = float(row["probability"]), float(row["probability_2"])
        assert first >= second
        assert first + second == pytest.approx(1, abs=1e-4)
        assert {row["class"], row["class_2"]} == {"ant", "bee"}


def test_python_predicts_paths_pillow_arrays_and_tensors_alike(predict: Call) -> None:
    model, path = load_finetuned("outputs/tuned"), Path("pictures/val/bee/03.png")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with Image.open(path) as image:
        array = np.array(image)
        inputs = [path, str(path), image, array, torch.from_numpy(array).permute(2, 0, 1)]
        predictions = model.predict(inputs, top=2)
    assert all([one.name for one in prediction] == ["bee", "ant"] for prediction in predictions)
    assert all(prediction[0].score == pytest.approx(predictions[0][0].score) for prediction in predictions)
    logits = model.objective.classifier(model.transform([path]))
    likeliest = logits.softmax(dim=1)[0].max()
    assert predictions[0][0].name == model.classes[int(logits.argmax())]
    assert predictions[0][0].score == pytest.approx(float(likeliest), abs=1e-5)
    assert model.predict(path)[0][0].score == pytest.approx(float(likeliest), abs=1e-5)


def test_videos_are_classified_by_the_frames_that_the_run_has_seen(predict: Call) -> None:
    for name, brightness in (("dark", 20), ("bright", 150)):
        write_clip(Path("clips", name, "0.mp4"), brightness)
    ended = predict(TUNED, "videos=clips", "draw=drawn")
    assert ended.status == 0, ended.errors
    assert {row["name"]: row["class"] for row in table()} == {"dark/0.mp4": "ant", "bright/0.mp4": "bee"}
    assert Path("drawn/dark/0.mp4.png").is_file()


def test_boxes_are_in_pixels_of_the_files_and_name_their_class(predict: Call) -> None:
    model = load_finetuned("outputs/boxes")
    small = torch.randint(0, 256, (3, 32, 20), dtype=torch.uint8)
    large = small.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    alone, first, enlarged = (model.predict(image, min_score=0.0)[0] for image in (small, small, large))
    assert alone == first
    assert alone, "the run keeps boxes of every score"
    assert {box.name for box in alone} <= {"ant", "bee"}
    scores = [prediction.score for prediction in alone]
    assert scores == sorted(scores, reverse=True)
    edges = torch.tensor([prediction.box for prediction in enlarged])
    assert (edges >= 0).all()
    assert edges[:, [0, 2]].max() <= 80
    assert edges[:, [1, 3]].max() <= 128
    assert edges.max() > 40, "not those of the encoder's 32 pixels"
    detected = model.objective.detect(model.letterbox([small[:, None]]))[0]  # of its height: nothing is scaled
    best = detected[detected[:, 5].argmax()]
    assert alone[0].box == pytest.approx(best[:4].clamp(torch.zeros(4), torch.tensor([20.0, 32, 20, 32])).tolist())
    assert alone[0].name == model.classes[int(best[4])]


def test_a_detector_has_a_row_for_each_box_and_for_each_file_without_one(predict: Call) -> None:
    assert predict(BOXES, "images=voc/JPEGImages", "out=b.csv", "min_score=0").status == 0
    rows = table("b.csv")
    assert {row["name"] for row in rows} == {f"{number}.png" for number in range(4)}
    assert len(rows) > 4
    assert all(0 <= float(row["left"]) <= float(row["right"]) <= 60 and float(row["score"]) >= 0 for row in rows)
    assert predict(BOXES, "images=voc/JPEGImages", "out=b.csv", "min_score=1").status == 0
    assert [(row["name"], row["class"], row["score"]) for row in table("b.csv")] == [
        (f"{number}.png", "", "") for number in range(4)
    ]


def test_files_that_cannot_be_read_have_a_row_with_the_reason(predict: Call) -> None:
    Path("pictures/val/ant/02.png").write_bytes(b"")
    ended = predict(TUNED, "images=pictures/val")
    assert ended.status == 0
    assert "11 files; 1 cannot be read, the column error says why" in ended.output
    row = table()[2]
    assert row == {"name": "ant/02.png", "class": "", "probability": "", "error": "an empty file"}
    for path in Path("pictures/val").rglob("*.png"):
        path.write_bytes(b"")
    ended = predict(TUNED, "images=pictures/val", "out=none.csv")
    assert ended.status == 1
    assert "ant/00.png: an empty file" in ended.errors


def test_pictures_are_drawn_with_their_class_or_boxes(predict: Call) -> None:
    assert predict(TUNED, "images=pictures/val", "draw=drawn", "batch_size=5").status == 0
    assert predict(BOXES, "images=voc/JPEGImages", "draw=boxes", "min_score=0").status == 0
    assert predict(BOXES, "images=voc/JPEGImages/0.png", "draw=plain", "min_score=1").status == 0
    assert len(list(Path("drawn").rglob("*.png"))) == 12
    with Image.open("drawn/bee/03.png.png") as image:
        assert max(image.size) >= DRAWN_SIDE
    with Image.open("boxes/0.png.png") as image, Image.open("plain/0.png.png") as plain:
        assert image.size == plain.size
        assert np.unique(np.array(plain).reshape(-1, 3), axis=0).tolist() == [[90, 90, 90]], "the picture alone"
        assert len(np.unique(np.array(image).reshape(-1, 3), axis=0)) > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["run=outputs/first", "images=pictures"],
            "outputs/first: has no head that predicts classes or boxes; fine-tu",
        ),
        (["run=timm:vit_tiny_patch16_224", "images=pictures"], "jepa-finetune run=timm:vit_tiny_patch16_224"),
        (["run=outputs/none", "images=pictures"], "outputs/none does not exist"),
        ([TUNED], "images or videos: one must be given"),
        ([TUNED, "images=none"], "images=none: there is no "),
        ([TUNED, "images=pictures", "out=x.txt"], "takes a file that ends in .csv"),
        ([TUNED, "images=pictures", "out=labels.csv"], "is no table of predictions"),
        ([TUNED, "images=pictures", "tpo=3"], 'did you mean "top"?'),
        ([BOXES, "videos=pictures"], "a detector takes images"),
        ([TUNED, "images=pictures", "min_score=2"], "min_score=2"),
    ],
)
def test_what_cannot_be_is_refused_by_name(arguments: list[str], message: str, predict: Call, monkeypatch) -> None:
    monkeypatch.setattr(finetuned, "load_finetuned", lambda *_: pytest.fail("nothing is loaded"))
    Path("labels.csv").write_text("file,label\n")
    ended = predict(*arguments)
    assert ended.status == 2
    assert message in ended.errors
    assert Path("labels.csv").read_text() == "file,label\n"
    assert not Path("predictions.csv").exists()


def test_an_earlier_table_is_replaced_at_once(predict: Call, monkeypatch) -> None:
    assert predict(TUNED, "images=pictures/val").status == 0
    before = Path("predictions.csv").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(Finetuned, "predict_prepared", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        ended = predict(TUNED, "images=pictures")
    assert ended.status == 130
    assert ended.errors.endswith("jepa-predict: stopped; no table was written\n")
    assert Path("predictions.csv").read_text() == before
    assert predict(TUNED, "images=pictures").status == 0
    assert len(table()) == 36


def test_the_head_is_not_exported_and_the_command_says_so(predict: Call, capfd) -> None:
    assert run("export", TUNED) == 0
    assert (
        "not exported: the head of the run (classes); jepa-predict run=outputs/tuned uses it" in capfd.readouterr().out
    )
    assert run("export", "run=outputs/first") == 0
    assert "head" not in capfd.readouterr().out
    encoder, tuned = load_encoder("outputs/tuned"), load_finetuned("outputs/tuned")
    path = Path("pictures/val/ant/00.png")
    torch.testing.assert_close(
        encoder(encoder.transform([path])), tuned.objective.backbone(tuned.transform([path]))
    )  # fmt: skip


def test_only_plain_values_and_heads_of_this_package_are_built(predict: Call) -> None:
    with pytest.raises(CheckpointError, match="has no head; train one with jepa-finetune run=outputs/first"):
        load_finetuned("outputs/first")
    encoder = load_encoder("outputs/first")
    node = {"_target_": "jepa.objectives.classify.Classification"}
    for values in ({"pooling": {"_target_": "os.system", "command": "false"}}, {"encoder": "x"}, {"other": 1}):
        with pytest.raises(ValueError, match=r"config\.yaml: objective"):
            finetuned._objective(node | values, encoder, ["ant", "bee"])
