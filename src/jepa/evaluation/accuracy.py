"""Accuracy of the trained classification head, overall and per class, and its confusion matrix."""

from __future__ import annotations

from torch import Tensor

from jepa.evaluation.pictures import enlarge, heatmap, montage
from jepa.evaluation.probe import BALANCED, confusion_counts, probe_task, scores, top1
from jepa.evaluation.types import Evaluation, Picture, Snapshot

FEW_CLASSES = 10
"""Number of classes from which on top-5 is reported; also the number of the worst classes in the caption."""
MAX_NAMES = 20
"""Number of classes up to which the caption names all."""
TABLE_SIDE = 320
"""Smallest side of the confusion matrix in pixels."""


class Accuracy:
    """Reports nothing without logits of the objective or labels of the samples."""

    judges = "classes"
    protocol = (
        "accuracy: predictions of the trained head on all validation samples, without augmentation: top-1 micro "
        f"accuracy in percent{BALANCED}; the last step counts, nothing is chosen on these samples"
    )

    def __call__(self, snapshot: Snapshot) -> Evaluation:
        task = probe_task(snapshot.train, snapshot.val)
        if snapshot.logits is None or isinstance(task, str):
            return Evaluation()
        labelled = snapshot.val.labels >= 0
        logits, labels = snapshot.logits[labelled], snapshot.val.labels[labelled]
        predicted = logits.argmax(dim=1)
        metrics = scores("probe/classifier", predicted, task)
        if logits.shape[1] >= FEW_CLASSES:
            in_top5 = (logits.topk(5, dim=1).indices == labels[:, None]).any(dim=1)
            metrics["probe/classifier_top5"] = 100.0 * in_top5.float().mean().item()
        return Evaluation(metrics, (confusion_picture(predicted, labels, snapshot.classes),))


def confusion_shares(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """[n], [n] -> float32 [classes, classes]: shares of the predictions (columns) for each true class (row)"""
    counts = confusion_counts(predicted, labels, num_classes)
    return counts / counts.sum(dim=1, keepdim=True).clamp(min=1)


def confusion_picture(predicted: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Picture:
    shares = confusion_shares(predicted, labels, len(classes))
    recalls = {int(label): top1(predicted[labels == label], labels[labels == label]) for label in labels.unique()}
    order = f", in the order {', '.join(classes)}" if len(classes) <= MAX_NAMES else ", in the order of the classes"
    worst = sorted(recalls, key=recalls.__getitem__)[:FEW_CLASSES]
    lowest = ", ".join(f"{classes[label]} {recalls[label]:.0f} %" for label in worst)
    absent = [name for label, name in enumerate(classes) if label not in recalls]
    missing = f" Not among the samples: {', '.join(absent[:FEW_CLASSES])}." if absent else ""
    caption = (
        f"Confusion matrix: a row for each true class, a column for each prediction{order}; bright is frequent, the "
        f"diagonal is correct. Lowest accuracies: {lowest}.{missing}"
    )
    return Picture("confusions", montage([enlarge(heatmap(shares[None]), TABLE_SIDE)]), caption)
