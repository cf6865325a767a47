"""Configurations: composed alike from everywhere, and refused in words with all faults at once."""

from __future__ import annotations

import importlib
import inspect
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa.config import (
    Composer,
    ConfigError,
    build_with,
    changed_keys,
    compose,
    factory,
    override_literal,
    signatures,
    to_dataclass,
    to_yaml,
)
from jepa.config.attributes import JEPAConfig
from jepa.config.catalogue import Catalogue, conf_folder, flatten
from jepa.suggestions import nearest
from jepa.types import PatchGrid

CATALOGUE = Catalogue([conf_folder()])
CHOICES = [(group, name) for group, choices in CATALOGUE.groups.items() for name in choices]
EMPTY = Path(__file__).parents[1] / "files" / "empty.tar"
VOC = [f"dataset.root_path={EMPTY.with_name('empty_voc')}", "dataset.split=null", "dataset.val_split=null"]
EPISODES = ["dataset=episodes", f"dataset.path={EMPTY.parent / 'empty_episodes'}"]
NEEDED = {
    "imagefolder": ["dataset.root_path=.", "dataset.image_folder=."],
    "videofolder": ["dataset.root_path=.", "dataset.video_folder=."],
    "driving_turn": ["dataset.root_path=.", "dataset.video_folder=.", "dataset.val_folder=null"],
    "steering": ["dataset.root_path=.", "dataset.image_folder=.", "dataset.annotations=null", "dataset.columns=[]"],
    "vjepa2_vitl16": ["dataset.root_path=.", "dataset.video_folder=."],
    "small_folder": [f"dataset.root_path={EMPTY.parents[2] / 'docs' / 'images'}", "dataset.image_folder=."],
    "sign_digits": ["dataset.root_path=.", "dataset.image_folder=."],
    "frames": ["dataset.root_path=.", "dataset.image_folder=."],
    "hf": ["dataset.path=somebody/something"],
    "trained": ["policy.run=outputs/dreamer"],
    "voc": VOC,
    "bccd_detection": [*VOC, "dataset.test_split=null"],
    "bccd_jepa": VOC,
    "detect": ["dataset=voc", *VOC],
    "detection": ["dataset=voc", *VOC, "objective=detect"],
    "accuracy": ["objective=classify"],
    "coco": [
        *(f"dataset.root_path={EMPTY.parent}", "dataset.annotations=empty.tar", "dataset.images=."),
        *("dataset.val_annotations=null", "dataset.val_images=null"),
    ],
    "webdataset": [f"dataset.shards={EMPTY}"],
    "episodes": EPISODES[1:],
    "driving_world": EPISODES[1:],
    "pretrained": ["encoder.weights=timm:vit_tiny_patch16_224"],
    "cross_view": ["augment.views=2"],
    "temporal_similarity": ["dataset=moving_digits", "encoder=temporal"],
    "temporal": ["dataset=moving_digits", "encoder=temporal"],
    "gym": ["env.id=CartPole-v1"],
    **{f"{group}={name}": ["experiment=two_rooms"] for group, name in CHOICES if group in ("planner", "cost")},
    "objective=dynamics": [*EPISODES, "num_frames=3"],
    "objective=iris": [*EPISODES, "num_frames=3"],
    "predictor=action": [*EPISODES, "num_frames=3", "objective=dynamics"],
    "encoder=pixels": [*EPISODES, "num_frames=3", "objective=dynamics"],
    "mask=none": ["predictor=projector", "regularizer=[cross_view,sigreg]", "augment.views=2"],
    "projector": ["mask=none", "regularizer=[cross_view,sigreg]", "augment.views=2"],
}
CLIPS = NEEDED["temporal"]
COMPOSER = Composer()


def needed_by(group: str, name: str) -> list[str]:
    return NEEDED.get(f"{group}={name}", NEEDED.get(name, []))


def faults(*overrides: str) -> list[str]:
    return COMPOSER.check(overrides).errors


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["epohcs=3"], 'epohcs=3: there is no key "epohcs"; did you mean "epochs"?'),
        (["learning_rate=1e-3"], 'did you mean "lr"?'),
        (["optimizer.lr=1e-3"], 'did you mean "lr"?'),
        (["model=resnet18"], 'did you mean "encoder"?'),
        (["imgsz=32"], 'did you mean "image_size"?'),
        (["checkpoint_every=20"], 'did you mean "save_every"?'),
        (["mask.ration=0.5"], 'did you mean "mask.ratio"?'),
        (["depth=4"], 'did you mean "encoder.depth" or "predictor.depth"?'),
        (["root_path=."], 'did you mean "dataset.root_path" (with dataset=cifar10, '),
        (
            ["dataset=cifar10", "dataset.image_folder=."],
            "the chosen dataset has no 'image_folder'; dataset=frames, imagefolder has",
        ),
        (["optimizer.amsgrad=true"], "torch.optim.AdamW takes it: write +optimizer.amsgrad=true"),
        (["+encoder.wings=2"], "SpatialEncoder has no 'wings'"),
        (["+encoder.clip_shape=[3,1,8,8]"], "is worked out by the program"),
        (["epochs=abc"], "epochs=abc: takes a whole number, not the text 'abc'"),
        (["lr=true"], "lr=true: takes a number, not true"),
        (["encoder.depth=2.5"], "encoder.depth=2.5: takes a whole number, not 2.5"),
        (["resume=3"], "resume=3: takes true or false or previous, not 3"),
        (["augment.flip=yes"], "augment.flip=yes: takes true or false, not the text 'yes'"),
        (["augment=3"], "augment=3: takes the keys crop_scale, crop_aspect, flip, views, jitter, "),
        (["augment.crop_scale=3"], "augment.crop_scale=3: takes a list of numbers, not 3"),
        (["optimizer.betas=0.9"], "optimizer.betas=0.9: takes a list of 2"),
        (["mask=blok"], 'mask=blok: no such choice; did you mean "block"?; valid: block, multiblock3d, '),
        (
            ["evaluator=[knn,lin]"],
            "valid: accuracy, attentive, detection, diagnostics, embeddings, finetune, knn, linear, linear_sgd",
        ),
        (["encoder.stem=convolution"], "encoder.stem=convolution: no such stem"),
        (["encoder.stem=conv", "encoder.patch_size=7", "image_size=28"], "its convolutions halve a patch"),
        (["encoder.stem=dictionary", "encoder.patch_size=14"], "its cells have 4 pixels a side"),
        (["encoder.stem_width=64"], "encoder.stem=linear has no width"),
        (["encoder.stem=conv", "encoder.stem_frozen=0.5"], "encoder.stem=conv always learns"),
        (["objective.target_view=other"], "there is no other crop with augment.views=1"),
        (["experiment=cifar10_cpu", "objective.target_view=other"], "with mask=none: there are no hidden tokens"),
        (["experiment=cifar10_cpu", "objective.target_layers=2"], "with mask=none: there are no hidden tokens"),
        (["hydra/launcher=slrum"], "hydra/launcher=slrum: no such choice"),
        (["mask=temporal"], "needs 2 time steps, 1 of context and 1 to predict, the clip has 1: choose a dataset that"),
        ([*CLIPS, "mask=temporal", "num_frames=1"], "with num_frames=1 and encoder.tubelet_size=2"),
        ([*CLIPS, "mask=temporal", "mask.horizon=8"], "mask.horizon=8 with num_frames=16 (dataset/moving_digits.yaml)"),
        ([*CLIPS, "mask=temporal", "mask.split=9"], "needs 10 time steps with split=9, 9 of context and 1 to predict"),
        ([*CLIPS, "mask=temporal", "mask.split=0"], "mask.split=0: must be a whole number of at least 1"),
        ([*CLIPS, "mask=temporal", "mask.past=2", "mask.split=3"], "mask.past=2: must be null with split=3"),
        ([*CLIPS, "mask=temporal", "mask.ratio=2"], "mask.ratio=2: must be above 0 and at most 1, or null"),
        ([*CLIPS, "mask=tube", "mask.ratio=0.9999"], "leaves no context"),
        (["mask=multiblock3d", "mask.sets=[]"], "mask.sets=[]: must be a list with at least one mask set"),
        (["mask=multiblock3d", "mask.sets.1.num_blocks=0"], "mask.sets.1.num_blocks=0: must be a whole number"),
        (
            ["mask=multiblock3d", "mask.sets=[{num_blocks:1,spatial_scale:[0.2,0.2],aspekt:[1,1]}]"],
            "a mask set has no 'aspekt'; did you mean \"aspect\"?",
        ),
        (["mask=block,random"], "several values need --multirun"),
        (["lr=1e-4,1e-3"], "a list is lr=[1e-4,1e-3]"),
        (["~mask"], "~mask: a group cannot be deleted"),
        (["~lr"], "lr: is lacking"),
        (["epochs 3"], "an override is KEY=VALUE"),
        (["name=[a"], "name=[a: cannot be read"),
        (["hydra.rnu.dir=x"], "rnu"),
        (["image_size=225"], "225 is not divisible by 16; nearest: 224, 240"),
        (["image_size=[224,100]"], "100 is not divisible by 16; nearest: 96, 112"),
        (["image_size=[224]"], "image_size=[224]: takes a number of pixels, or [height, width]"),
        (["image_size=8"], "8 is not divisible by 16; nearest: 16"),
        (["encoder.num_heads=7"], "7 heads do not divide a width of 768; nearest: 6, 8 heads"),
        (["predictor.num_heads=5"], "predictor.num_heads=5: 5 heads do not divide a width of 384"),
        (["encoder.embed_dim=42", "encoder.num_heads=3"], "need a width divisible by 4"),
        (["mask.ratio=0.9999"], "mask.ratio=0.9999 with image_size=224"),
        (["mask=random", "mask.ratio=0.001"], "leaves no target"),
        (["image_size=32", "mask.ratio=0.1"], "no room for both"),
        (["mask.target_scale=[0.3,0.2]"], "two numbers, the smaller first"),
        (["augment.crop_scale=[0.3,1.5]"], "above 0 and at most 1"),
        (
            ["augment.crop_scale=[0.0,1.0]"],
            "augment.crop_scale=[0.0,1.0]: must be two numbers, the smaller first, above 0",
        ),
        (["augment.crop_scale=[0.5,0.3]"], "augment.crop_scale=[0.5,0.3]: must be two numbers, the smaller first"),
        (["augment.crop_aspect=[0.0,1.0]"], "augment.crop_aspect=[0.0,1.0]: must be two numbers"),
        (["augment.views=0"], "augment.views=0: must be at least 1"),
        (["augment.jitter=3.0"], "augment.jitter=3.0: must be from 0 to 2.5"),
        (["augment.grayscale=-0.1"], "augment.grayscale=-0.1: must be from 0 to 1"),
        (["augment.blur=1.5"], "augment.blur=1.5: must be from 0 to 1"),
        (["hardware.utilisation=0"], "hardware.utilisation=0: must be above 0 and at most 1"),
        (["objective.momentum=1.1"], "objective.momentum=1.1: must be from 0 to 1"),
        (["encoder.drop_path=1"], "encoder.drop_path=1: must be at least 0 and below 1"),
        (["encoder.patch_size=[16,0]"], "encoder.patch_size=[16,0]: each must be at least 1"),
        (["dataset.side=4"], "dataset.side=4: must be from 8 to 1024"),
        (["evaluator.knn.k=0"], "evaluator.knn.k=0: must be at least 1"),
        (["logger=wandb", "logger.wandb.mode=onlin"], 'no such mode; did you mean "online"?; valid: online, offline'),
        (["augment.crop_aspect=[2,1]"], "the smaller first"),
        (["schedule.warmup_epochs=100"], "the warm-up must be shorter than the run"),
        (["steps=50", "schedule.warmup_epochs=1"], "steps=50: a warm-up of 312 steps"),
        (["schedule.warmup_ratio=1.0"], "a warm-up as long as the run"),
        (
            [*EPISODES, "num_frames=3", "objective=dynamics", "objective.inverse_steps=3"],
            "num_frames=3 with objective.inverse_steps=3: no two frames of a clip are so many steps apart",
        ),
        (["num_frames=16"], "num_frames=16: Shapes delivers images: num_frames=1"),
        (
            [*CLIPS, "num_frames=7"],
            "encoder.tubelet_size=2 (encoder/temporal.yaml): 7 is not divisible by 2; nearest: 6, 8",
        ),
        ([*CLIPS, "num_frames=3", "encoder.tubelet_size=4"], "3 is not divisible by 4; nearest: 4"),
        ([*CLIPS, "+dataset.num_frames=8"], "is worked out by the program, it cannot be set; use num_frames"),
        (["+predictor.num_mask_tokens=2"], "is worked out by the program"),
        (["predictor.position=rotary"], "no such position; valid: sincos, rope, vjepa2"),
        ([*CLIPS, "encoder.position=rop"], 'did you mean "rope"?; valid: sincos, rope, vjepa2'),
        (["predictor.position=rope", "predictor.width=48"], "heads of an even width of at least 6, not 4"),
        (["regularizer=[vicreg,sig]"], 'did you mean "sigreg"?'),
        (["regularizer.variance=2"], 'did you mean "regularizer.vicreg.variance" (with regularizer=vicreg)?'),
        (["regularizer=vicreg", "regularizer.vicreg.variance=high"], "takes a number, not the text 'high'"),
        (["phases=3"], "phases=3: takes a list"),
        (["phases=[{share:0.5},{share:0.4}]"], "the shares sum to 0.9, not to 1"),
        (["phases=[3]"], "phases[0]: 3 is no phase; its keys: share, image_size, num_frames, micro_batch_size"),
        (["phases=[{share:1,image_sise:96}]"], 'image_sise=96: a phase has no such key; did you mean "image_size"?'),
        (["phases=[{share:0},{share:1}]"], "phases[0]: share=0: must be a number above 0"),
        (["phases=[{share:1,image_size:null}]"], "phases[0]: image_size=null: must be a whole number"),
        (["phases=[{share:1,image_size:225}]"], "phases[0]: image_size=225 with encoder.patch_size=16"),
        (["phases=[{share:1,num_frames:2}]"], "phases[0]: num_frames=2: Shapes delivers images"),
        (["phases=[{share:1,micro_batch_size:24}]"], "phases[0]: micro_batch_size=24 with batch_size=64"),
        ([*CLIPS, "phases=[{share:1,num_frames:9}]"], "phases[0]: num_frames=9 with encoder.tubelet_size=2"),
        (
            [*CLIPS, "mask=temporal", "mask.horizon=4", "phases=[{share:0.5},{share:0.5,num_frames:8}]"],
            "phases[1]: mask.horizon=4 with num_frames=8 and encoder.tubelet_size=2",
        ),
        (
            ["image_size=64", "mask.ratio=0.9", "phases=[{share:1,image_size:16}]"],
            "phases[0]: mask.ratio=0.9 with image_size=16",
        ),
        (["strategy=single", "processes=2"], "strategy=single with processes=2: use strategy=ddp or fsdp"),
        (["batch_size=64", "processes=3"], "processes=3 with batch_size=64: equal shares need 63 or 66"),
        (["device=cuda:1", "processes=2"], "each has a GPU of its own; use device=cuda"),
        (["batch_size=64", "micro_batch_size=24"], "24 does not divide 64"),
        (["batch_size=64", "dataset.num_samples=63"], "smaller than one batch"),
        (
            ["dataset=videofolder", *NEEDED["videofolder"], "dataset.fps=8", "dataset.stride=2"],
            "dataset.fps=8 with dataset.stride=2: give one of them",
        ),
        (
            ["dataset=videofolder", "dataset.root_path=/nowhere"],
            "there is no folder /nowhere; / holds",
        ),
        (["dataset=webdataset", "dataset.shards=/nowhere/train.tar"], "there is no /nowhere/train.tar; / holds"),
        (["dataset=webdataset", 'dataset.shards="a-{0..2}.tar"'], "a-0.tar (3 of 3 are missing)"),
        (["dataset=webdataset", "dataset.shards=/nowhere/*.tar"], "no .tar file is there; / holds"),
        (["dataset=webdataset", f"dataset.shards={__file__}"], "test_config.py is no .tar; unpack"),
        (["dataset=mixture", "+dataset.parts.clips.sped=1"], "MovingDigits has no 'sped'"),
        (["epochs=0"], "epochs=0: must be at least 1"),
        (["lr=0"], "lr=0: must be above 0"),
        (["precision=fp16"], "valid: auto, bf16, fp32"),
        (["objective=mae", "regularizer=none", "mask=none"], "mask=none: hides no patch"),
        (
            ["objective=mae", "regularizer=vicreg"],
            "regularizer=vicreg: objective=mae uses no regularizer; leave it out",
        ),
        (
            ["objective.context_weight=0.5", "predictor=cross_attention"],
            "objective.context_weight=0.5: needs predictor=transformer with predictor.joint=true",
        ),
        (["objective.context_weight=-1"], "objective.context_weight=-1: must not be negative"),
        (["evaluator=accuracy"], "evaluator=accuracy: objective=jepa gives accuracy nothing to look at; leave it out"),
        (["objective=vae", "predictor.depth=2"], "predictor.depth=2: objective=vae uses no predictor; leave it out"),
        (["objective=mae", "objective.momentum=0.9"], "has no 'momentum'; objective=classify, dynamics, jepa has"),
        (
            ["objective=vae", "objective.bottleneck=pool"],
            'no such bottleneck; did you mean "pooled"?; valid: pooled, tokens',
        ),
        (
            ["objective=mae", "objective.decoder_width=100"],
            "objective.decoder_width=100 with objective.decoder_num_heads=",
        ),
        (["objective=mae", "encoder.embed_dim=60", "encoder.num_heads=3"], "a decoder of width 30 and 3 heads"),
        (["objective.target=teacher"], "no such target; valid: ema, stopgrad, none"),
        (["mask=none"], "nothing is hidden that could be predicted; choose a mask, or predictor=projector"),
        (["predictor=projector"], "but compares views: use mask=none"),
        (["mask=none", "predictor=projector"], "regularisers are the whole loss then, and there is none"),
        (["device=gpu"], "valid: auto, cpu, cuda"),
        (["name=../up"], "names a folder below outputs/"),
        (["dataset=hf"], "dataset.path=??? (dataset/hf.yaml): must be given, as dataset.path=VALUE"),
        (["dataset=hf", "dataset.path=./nowhere.parquet"], "nowhere.parquet; "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_fault_is_named_with_its_remedy(overrides: list[str], expected: str) -> None:
    found = faults(*overrides)
    assert len(found) == 1
    assert expected in found[0]


def test_all_faults_come_in_one_answer() -> None:
    with pytest.raises(ConfigError) as error:
        compose(["epohcs=3", "mask=blok", "image_size=225", "lr=fast", "encoder.num_heads=7", "a b"])
    found = error.value.errors
    assert [sum(word in fault for fault in found) for word in ("epohcs", "blok", "225", "fast", "7 heads", "a b")] == [
        1
    ] * 6
    assert str(error.value).startswith("6 errors in the configuration, nothing was started\n  ")


def test_missing_folder_says_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    found = faults("dataset=imagefolder", f"dataset.root_path={tmp_path}", "dataset.image_folder=train")
    assert len(found) == 1
    assert f"there is no folder {tmp_path / 'train'}; {tmp_path} holds pictures/; expected" in found[0]


@pytest.mark.parametrize(("group", "name"), CHOICES, ids=[f"{group}={name}" for group, name in CHOICES])
def test_every_choice_composes_without_a_fault(group: str, name: str) -> None:
    needed = (
        NEEDED["imagefolder"] + ["dataset.val_folder=null"]
        if group == "experiment" and "in1k" in name
        else needed_by(group, name)
    )
    commands = {"env": "collect", "policy": "collect", "planner": "plan", "cost": "plan", "world": "rl", "rl": "rl"}
    composer = Composer(None, commands[group]) if group in commands else COMPOSER
    assert not composer.check([f"{group}={name}", *needed]).errors


@pytest.mark.parametrize("image_size", [32, 96, "[64,128]"])
@pytest.mark.parametrize("mask", CATALOGUE.groups["mask"])
def test_masks_go_with_small_and_oblong_images(mask: str, image_size: object) -> None:
    assert not faults(f"mask={mask}", f"image_size={image_size}", *needed_by("mask", mask), "encoder.patch_size=8")


@pytest.mark.parametrize("num_frames", [1, 2, 16])
@pytest.mark.parametrize("encoder", ["spatial", "temporal"])
@pytest.mark.parametrize("mask", CATALOGUE.groups["mask"])
def test_masks_go_with_clips_and_images_of_either_encoder(mask: str, encoder: str, num_frames: int) -> None:
    needed = NEEDED["mask=none"] if mask == "none" else []
    clips = ["dataset=moving_digits", f"encoder={encoder}", f"num_frames={num_frames}"]
    found = faults(f"mask={mask}", *clips, *needed)
    steps = num_frames if encoder == "spatial" else max(1, num_frames // 2)
    assert len(found) == (mask == "temporal" and steps == 1)


def test_a_fault_of_all_phases_is_told_once() -> None:
    found = faults("mask.ratio=2", "batch_size=64", "micro_batch_size=24", "phases=[{share:0.5},{share:0.5}]")
    assert len(found) == 2


def test_nested_data_sets_are_held_to_their_signatures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "groups/dataset").mkdir(parents=True)
    (tmp_path / "groups/dataset/both.yaml").write_text(
        "# two data sets\n_target_: my_data.Mixture\nparts:\n"
        "  drawn: {_target_: jepa.data.embedded.Shapes, num_sampels: 3, side: wide}\n"
        "  moving: {_target_: jepa.data.moving_digits.MovingDigits, num_frames: 4}\n"
    )
    (tmp_path / "my_data.py").write_text(
        "class Mixture:\n    def __init__(self, *, parts: dict, num_frames: int): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = Composer(tmp_path / "groups").check(["dataset=both", "num_frames=8"]).errors
    parts, file = "dataset.parts", "(dataset/both.yaml)"
    assert found == [
        f"{parts}.drawn.num_sampels=3 {file}: Shapes has no 'num_sampels'; did you mean \"num_samples\"?",
        f"{parts}.drawn.side=wide {file}: takes a whole number, not the text 'wide'",
        f"{parts}.moving.num_frames=4 {file}: is worked out by the program, it cannot be set; use num_frames",
    ]


def test_a_component_has_the_rules_that_its_class_names_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "groups/dataset").mkdir(parents=True)
    (tmp_path / "groups/dataset/mine.yaml").write_text(
        "# my data set\n_target_: my_set.Mine\npath: /nowhere/at/all.parquet\nfps: 8\nstride: 2\nroot_path: /nowhere\n"
        "image_folder: none\nshards: none.tar\ndownload: false\n"
    )
    (tmp_path / "my_set.py").write_text(
        "class Mine:\n    rules = ('my_rules.even',)\n"
        "    def __init__(self, *, path, fps, stride, root_path, image_folder, shards, download): ...\n"
    )
    (tmp_path / "my_rules.py").write_text(
        "def even(checked, path):\n    if checked[f'{path}.fps'] % 2:\n        yield f'{path}.fps: must be even'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    composer = Composer(tmp_path / "groups")
    assert composer.check(["dataset=mine"]).errors == []
    assert composer.check(["dataset=mine", "dataset.fps=7"]).errors == ["dataset.fps: must be even"]


def test_what_python_builds_is_checked_by_the_same_annotations() -> None:
    node = {"_target_": "jepa.masks.none.NoMask"}
    assert build_with(node, grid=PatchGrid(1, 2, 2), unknown=3).num_tokens == 4
    with pytest.raises(ValueError, match=r"Shapes: num_samples=0: must be at least 1; side=wide: takes a whole number"):
        factory({"_target_": "jepa.data.embedded.Shapes", "num_samples": 0, "side": "wide"})


def test_regularizers_run_alone_or_together() -> None:
    assert compose().regularizer == compose(["regularizer=none"]).regularizer == {}
    assert list(compose(["regularizer=vicreg"]).regularizer) == ["vicreg"]
    both = compose(["regularizer=[vicreg,sigreg]", "regularizer.vicreg.variance=2"]).regularizer
    assert (list(both), both["vicreg"]["variance"]) == (["vicreg", "sigreg"], 2)
    assert compose(["experiment=quickstart", "regularizer=[sigreg]"]).regularizer == {"sigreg": both["sigreg"]}


def test_regularizers_are_chosen_from_python() -> None:
    config = JEPAConfig()
    assert config.regularizer == "none"
    config.regularizer = "vicreg"
    assert config.regularizer == "vicreg"
    config.regularizer.vicreg.variance = 2
    assert config.compose() == compose(["regularizer=vicreg", "regularizer.vicreg.variance=2"])
    config.regularizer = ["vicreg", "sigreg"]
    assert config.compose() == compose(["regularizer=[vicreg,sigreg]", "regularizer.vicreg.variance=2"])
    with pytest.raises(ConfigError, match='did you mean "sigreg"'):
        config.regularizer = ["sigrek"]


def test_experiment_may_choose_several_regularizers(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/two.yaml").write_text(
        "# @package _global_\n# two regularisers\ndefaults:\n  - override /regularizer: [vicreg, sigreg]\n"
        "regularizer:\n  vicreg:\n    variance: 3.0\n"
    )
    config = compose(["experiment=two"], config_dir=tmp_path)
    assert (list(config.regularizer), config.regularizer["vicreg"]["variance"]) == (["vicreg", "sigreg"], 3.0)


def test_published_defaults() -> None:
    config = compose()
    assert (config.image_size, config.batch_size, config.lr, config.epochs) == (224, 64, 1e-4, 100)
    encoder = {key: config.encoder[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")}
    assert encoder == {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    assert config.mask["ratio"] == 0.75


def test_ijepa_preset_has_the_published_hyper_parameters() -> None:
    config = compose(["experiment=ijepa_vith14_in1k", *NEEDED["imagefolder"], "dataset.val_folder=null"])
    assert (config.batch_size, config.epochs, config.precision, config.augment.flip) == (2048, 300, "bf16", False)
    assert (config.lr, config.lr * config.schedule["start_ratio"]) == pytest.approx((1e-3, 2e-4))
    assert config.lr * config.schedule["final_ratio"] == pytest.approx(1e-6)
    assert (config.encoder["embed_dim"], config.encoder["depth"], config.encoder["patch_size"]) == (1280, 32, 14)
    assert (config.predictor["width"], config.predictor["depth"]) == (384, 12)


def test_string_given_for_a_name_is_kept_as_text() -> None:
    assert compose(["name=2024"]).name == "2024"


def test_resume_false_refuses_an_existing_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compose(["name=one", "resume=false"])
    (tmp_path / "outputs/one").mkdir(parents=True)
    compose(["name=one", "resume=false"])
    (tmp_path / "outputs/one/metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"outputs/one holds a run already \(metrics.jsonl\)"):
        compose(["name=one", "resume=false"])
    compose(["name=one"])


def test_composing_leaves_an_outer_hydra_application_alone(tmp_path: Path) -> None:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    (tmp_path / "other.yaml").write_text("answer: 42\n")
    with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path)):
        compose(["name=inner"])
        assert hydra_compose("other").answer == 42


def test_schema_refuses_a_wrong_type_in_plain_hydra_too() -> None:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException

    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        for override in ("epochs=abc", "epohcs=3"):
            with pytest.raises(HydraException):
                hydra_compose("train", overrides=[override])


def test_yaml_of_a_configuration_reads_back_equal() -> None:
    config = compose(["lr=3e-5", "image_size=[64,128]", "regularizer=vicreg"])
    assert to_dataclass(yaml.safe_load(to_yaml(config))) == config


def test_factory_takes_the_rest_of_the_arguments_as_objects() -> None:
    schedule = factory(compose().schedule)(total_steps=10, steps_per_epoch=5, lr=1.0)
    assert schedule.lr_at(schedule.warmup_steps) == 1.0
    assert factory({})() is None


def test_changed_keys_leaves_out_what_does_not_change_the_result() -> None:
    old = asdict(compose())
    new = asdict(compose(["name=x", "logger=none", "evaluator=[knn]", "num_workers=3", "lr=3e-4", "encoder.depth=3"]))
    assert changed_keys(old, old) == []
    assert changed_keys(old, new) == ["lr: 0.0001 -> 0.0003", "encoder.depth: 12 -> 3"]


def test_a_key_that_an_earlier_version_lacked_changes_nothing_at_its_default() -> None:
    old = asdict(compose(["regularizer=vicreg"]))
    for section, key in (("objective", "target"), ("mask", "target_scale"), ("augment", "jitter")):
        del old[section][key]
    del old["clip_grad"], old["regularizer"]["vicreg"]["covariance"]
    assert changed_keys(old, asdict(compose(["regularizer=vicreg"]))) == []
    given = ["regularizer=vicreg", "objective.target=stopgrad", "mask.target_scale=[0.1,0.2]", "augment.jitter=0.5"]
    assert changed_keys(old, asdict(compose([*given, "clip_grad=null", "regularizer.vicreg.covariance=0.5"]))) == [
        "clip_grad: absent -> null",
        "augment.jitter: absent -> 0.5",
        "mask.target_scale: absent -> [0.1,0.2]",
        "objective.target: absent -> stopgrad",
        "regularizer.vicreg.covariance: absent -> 0.5",
    ]
    assert changed_keys(old, asdict(compose(["regularizer=vicreg", "mask=random"])))[-1].startswith("mask")


def test_python_configuration_equals_that_of_the_overrides(tmp_path: Path) -> None:
    (tmp_path / "data/train").mkdir(parents=True)
    config = JEPAConfig("mask=random", "encoder.depth=6", epochs=3)
    config.root_path = str(tmp_path / "data")  # before the choice that has it
    config.image_folder = "train"
    config.dataset = "imagefolder"
    config.encoder.num_heads = 6
    config.evaluator = ["knn", "linear"]
    config.augment.crop_scale = (0.5, 1.0)
    config.name = "it's a 'name'"
    assert config.compose() == compose(
        [
            "mask=random",
            "encoder.depth=6",
            "epochs=3",
            "dataset=imagefolder",
            f"dataset.root_path={tmp_path}/data",
            "dataset.image_folder=train",
            "encoder.num_heads=6",
            "evaluator=[knn,linear]",
            "augment.crop_scale=[0.5,1.0]",
            r"name='it\'s a \'name\''",
        ]
    )


def test_python_configuration_without_assignments_is_the_default() -> None:
    assert JEPAConfig().compose() == compose()


def test_python_configuration_reads_back_what_was_set_or_the_default() -> None:
    config = JEPAConfig("encoder.depth=6", size="tiny", lr=3e-4)
    assert (config.lr, config.epochs, config.encoder.depth, config.encoder.num_heads) == (3e-4, 100, 6, 3)
    assert config.dataset == "shapes"
    assert config.evaluator == [
        "knn",
        "linear",
        "regression",
        "diagnostics",
        "selection",
        "reconstructions",
        "embeddings",
        "detection",
    ]
    assert config.name == "jepa-shapes"
    config.augment.flip = False
    assert (config.augment.crop_scale, config.augment.flip, config.augment.views) == ([0.3, 1.0], False, 1)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epohcs", 3, 'did you mean "epochs"?'),
        ("depth", 3, "which of encoder.depth, predictor.depth?"),
        ("mask", "blok", 'did you mean "block"?'),
        ("nonsense", 3, 'no key "nonsense"'),
    ],
)
def test_wrong_attribute_is_refused_at_once(name: str, value: object, expected: str) -> None:
    config = JEPAConfig()
    with pytest.raises(ConfigError) as error:
        setattr(config, name, value)
    assert expected in error.value.errors[0]


def test_wrong_attribute_of_a_section_is_refused_at_once() -> None:
    config = JEPAConfig()
    with pytest.raises(ConfigError, match=r"encoder\.depth"):
        config.encoder.dept = 3
    assert not hasattr(config.encoder, "dept")


def test_wrong_values_of_a_python_configuration_come_in_one_answer() -> None:
    with pytest.raises(ConfigError) as error:
        JEPAConfig(epochs="many", image_size=225).compose()
    assert len(error.value.errors) == 2


@pytest.mark.parametrize(
    "target", ["jepa.schedules.WarmupStableDecay", "jepa.masks.block.BlockMasker", "torch.optim.AdamW"]
)
def test_signature_from_source_is_that_of_the_object(target: str) -> None:
    module, _, name = target.rpartition(".")
    expected = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    found = signatures.read(target)
    assert found is not None
    assert {p.name: p.is_required for p in found.parameters.values()} == {
        p.name: p.default is p.empty for p in expected.values()
    }


@pytest.mark.parametrize(
    "target", ["jepa.masks.block.BlokMasker", "jepa.masks.blok.BlockMasker", "no_such_package.Thing"]
)
def test_target_that_does_not_exist_is_a_lookup_error(target: str) -> None:
    with pytest.raises(LookupError):
        signatures.read(target)


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        ("int", [0, -3], [True, 1.0, "1", None, [1]]),
        ("float", [0, 1.5], [True, "1", None]),
        ("bool", [True], [0, "true", None]),
        ("str", ["x", ""], [1, None, ["x"]]),
        ("int | None", [1, None], ["x", 1.5]),
        ("Optional[float]", [1, None], ["x"]),
        ("tuple[float, float]", [[0.1, 1]], [[1], 0.5, [1, "x"], [1, 2, 3]]),
        ("tuple[int, ...]", [[], [1, 2]], [["x"], 1]),
        ("int | Sequence[int]", [3, [3, 4]], ["3", [1.5]]),
        ("Literal['mse', 'l1']", ["mse"], ["l2", 1]),
        ("Annotated[str, Literal['a', 'b']]", ["a"], ["c", 1]),
        ("PositiveInt", [1, 7], [0, 1.5, True, "1"]),
        ("NonNegative | None", [0, 0.5, None], [-0.1, float("nan")]),
        ("ShareBelowOne", [0, 0.9], [1, -0.1]),
        ("Sequence[Positive]", [[], [0.1, 2]], [[0.1, 0], 0.1]),
        ("Annotated[int, Within(2, 4)]", [2, 4], [1, 5, 2.5]),
        ("Annotated[list[float], Within(0, 1, above=True)]", [[0.1, 1]], [[0, 1], [0.5, 0.1], [0.5], [0.5, 1.1]]),
        ("dict[str, int]", [{"a": 1}], [1, "a"]),
        ("'int'", [1], ["x"]),
        ("nn.Module", [1, "anything"], []),
    ],
)
def test_values_fit_annotations(annotation: str, good: list, bad: list) -> None:
    kind = signatures.annotated_type(annotation)
    assert all(signatures.fits(kind, value) for value in good)
    assert not any(signatures.fits(kind, value) for value in bad)


@settings(max_examples=20, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), st.lists, max_leaves=4))
def test_python_values_survive_as_overrides(value: object) -> None:
    parsed, unread = COMPOSER.parse([f"key={override_literal(value)}"])
    assert not unread
    assert parsed[0].value() == value


@settings(max_examples=20, deadline=None)
@given(
    st.dictionaries(st.text("abc", min_size=1), st.dictionaries(st.text("abc", min_size=1), st.integers(), min_size=1))
)
def test_flatten_names_every_leaf(tree: dict) -> None:
    leaves = dict(flatten(tree))
    assert leaves == {f"{outer}.{inner}": value for outer, part in tree.items() for inner, value in part.items()}


def test_nothing_is_suggested_for_a_name_like_no_other() -> None:
    assert nearest("zzzzzz", ["epochs", "lr", "mask.ratio"]) == []


def test_configuration_is_found_from_any_folder(tmp_path: Path) -> None:
    before = os.getcwd()
    try:
        os.chdir(tmp_path)
        assert compose().epochs == 100
    finally:
        os.chdir(before)


@pytest.mark.parametrize("group", ["evaluator", "logger", "regularizer"])
def test_nothing_may_be_chosen_of_a_group_of_many(group: str) -> None:
    assert getattr(compose([f"{group}=[]"]), group) == {}


def test_an_experiment_serves_other_objectives_than_its_own() -> None:
    config = compose(["experiment=quickstart", "objective=vae"])
    assert (config.predictor, config.regularizer) == ({}, {})
    assert config.mask == {"_target_": "jepa.masks.none.NoMask"}
    assert "momentum" not in config.objective
    assert compose(["experiment=quickstart", "objective=mae"]).mask["ratio"] == 0.6


FAULTY_YAML = {
    "a function": (b'num_samples: !!python/object/apply:pathlib.Path.touch ["ran"]', "python/object/apply"),
    "the name of a function": (b"num_samples: !!python/name:os.system", "python/name"),
    "other bytes": (b"\xff\xfe\x00", "utf-8"),
    "100,000 brackets": (b"[" * 100_000, "more than 50 lists"),
    "an alias of itself": (b"num_samples: &a [*a]", "more than 50 lists"),
    "text as a number": (b"num_samples: !!int many", "tag:yaml.org,2002:int"),
    "a list as a key": (b"? [1]\n: 2", "unhashable key"),
    "a key twice": (b"a: 1\na: 2", "duplicate key a"),
    "a merge of a number": (b"<<: 3", "for merging"),
}


@pytest.mark.parametrize("kind", FAULTY_YAML)
def test_a_faulty_file_of_ones_own_is_named_and_runs_no_code(kind: str, tmp_path: Path, monkeypatch) -> None:
    content, reason = FAULTY_YAML[kind]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "a_faulty_one_too.yaml").write_bytes(b"\xff")
    (tmp_path / "dataset" / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        compose(["dataset=mine"], config_dir=tmp_path)
    assert reason in str(raised.value)
    assert str(tmp_path / "dataset" / "mine.yaml") in str(raised.value)
    assert not (tmp_path / "ran").exists()
    compose(["dataset=shapes"], config_dir=tmp_path)  # which the others do not concern


@pytest.mark.parametrize("content", [b"- a", b"", b"a: 2020-99-99"])
def test_a_file_of_ones_own_without_a_target_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match="dataset: lacks a _target_"):
        compose(["dataset=mine"], config_dir=tmp_path)


def test_a_foreign_data_set_that_declares_no_fields_is_not_refused_for_them(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "mine.yaml").write_text("_target_: torch.utils.data.TensorDataset\n")
    with pytest.raises(ConfigError) as raised:
        compose(["dataset=mine", "objective=detect", "objective.no_such_key=1"], config_dir=tmp_path)
    assert "learns from boxes" not in str(raised.value)
