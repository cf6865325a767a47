"""How often the head that is trained is right, over all and by class, and what it takes for what."""

from __future__ import annotations

from torch import Tensor

from jepa.evaluation.pictures import enlarge, heat, montage
from jepa.evaluation.probe import BALANCED, confusion_counts, probe_task, scores, top1
from jepa.evaluation.types import Evaluation, Picture, Snapshot

FEW = 10
"""classes from which on top-5 says something; also how many of the worst are named"""
MAX_NAMES = 20
"""of classes, that are named in full"""
TABLE_SIDE = 320
"""pixels, at least, of the table of confusions"""


class Accuracy:
    """Silent where the objective gives no logits, or the samples have no labels."""

    judges = "classes"
    protocol = (
        "accuracy: of the answers of the head that is trained, on all validation samples without augmentation, top-1 "
        f"micro accuracy in percent{BALANCED}; what counts is the last step, nothing is chosen on these samples"
    )

    def __call__(self, snapshot: Snapshot) -> Evaluation:
        task = probe_task(snapshot.train, snapshot.val)
        if snapshot.logits is None or isinstance(task, str):
            return Evaluation()
        labelled = snapshot.val.labels >= 0
        logits, labels = snapshot.logits[labelled], snapshot.val.labels[labelled]
        predicted = logits.argmax(dim=1)
        metrics = scores("probe/classifier", predicted, task)
        if logits.shape[1] >= FEW:
            among = (logits.topk(5, dim=1).indices == labels[:, None]).any(dim=1)
            metrics["probe/classifier_top5"] = 100.0 * among.float().mean().item()
        return Evaluation(metrics, (confusion_picture(predicted, labels, snapshot.classes),))


def confusion_shares(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """[n], [n] -> float32 [classes, classes]: of a true class (row) the share that was taken for each (column)."""
    counts = confusion_counts(predicted, labels, num_classes)
    return counts / counts.sum(dim=1, keepdim=True).clamp(min=1)


def confusion_picture(predicted: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Picture:
    shares = confusion_shares(predicted, labels, len(classes))
    found = {int(label): top1(predicted[labels == label], labels[labels == label]) for label in labels.unique()}
    order = f", in the order {', '.join(classes)}" if len(classes) <= MAX_NAMES else ", in the order of the classes"
    worst = sorted(found, key=found.__getitem__)[:FEW]
    told = ", ".join(f"{classes[label]} {found[label]:.0f} %" for label in worst)
    lacking = [name for label, name in enumerate(classes) if label not in found]
    missing = f" Not among the samples: {', '.join(lacking[:FEW])}." if lacking else ""
    caption = (
        f"What is taken for what: a row for each true class, a column for each answer{order}; bright is often, the "
        f"diagonal is right. Lowest accuracies: {told}.{missing}"
    )
    return Picture("confusions", montage([enlarge(heat(shares[None]), TABLE_SIDE)]), caption)
