"""Training runs that take seconds."""

from jepa import JEPAAgent, JEPAConfig

TINY = [
    "image_size=32",
    "encoder.patch_size=8",
    "encoder.embed_dim=32",
    "encoder.depth=2",
    "encoder.num_heads=2",
    "predictor.width=16",
    "predictor.depth=1",
    "mask.ratio=0.5",
    "dataset.num_samples=96",
    "batch_size=16",
    "num_workers=0",
    "logger=none",
    "precision=fp32",
    "log_every=2",
    "evaluation.train_samples=64",
    "evaluation.val_samples=32",
]


def agent(folder, *overrides):
    return JEPAAgent(JEPAConfig(*TINY, *overrides), folder=folder)
