"""Metrics of classification, computed without a network; a new one is one entry in `METRICS`.

They are computed from all predictions at once. On several processes Trainer gathers these first and drops the repeats
that fill the last batch, so that the numbers are those of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from transformers import EvalPrediction

from .values import one_of, require

# scikit-learn and evaluate are imported where they are used: together they take a second, which every import of the
# trainer would pay.
if TYPE_CHECKING:
    import evaluate

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class ClassificationMetric:
    """A number that is computed from predictions and true classes.

    Args:
        name: key of the result.
        description: one sentence.
        measure: function of predictions, as `takes` says, and true classes [n], which returns the number.
        takes: `"classes"`: predicted classes [n]; `"logits"`: logits [n, classes]; `"probabilities"`: class
            probabilities [n, classes].
    """

    name: str
    description: str
    measure: Callable[[np.ndarray, np.ndarray], float]
    takes: Literal["classes", "logits", "probabilities"] = "classes"


def accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return the share of equal entries of two vectors of classes [n], as `evaluate.load("accuracy")` does."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(references, predictions))


def mean_per_class_accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return the accuracy within each class, averaged over the classes that have images, whatever their number.

    The metric of Flowers102 and Oxford-IIIT Pet in most transfer studies; scikit-learn's balanced accuracy.

    Args:
        predictions, references: predicted and true classes [n].
    """
    from sklearn.metrics import recall_score

    return float(recall_score(references, predictions, labels=np.unique(references), average="macro"))


def top5_accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return the share of images whose class is among the five largest logits; 1 with up to five classes.

    Of equal logits the one of the smaller class number counts as larger, as in `argmax`.

    Args:
        predictions: logits [n, classes].
        references: true classes [n].
    """
    true = np.take_along_axis(predictions, references[:, None], axis=1)
    is_earlier = np.arange(predictions.shape[1]) < references[:, None]
    # Asked this way round, a row of NaN is wrong.
    behind = (predictions < true) | ((predictions == true) & ~is_earlier)
    return float(np.mean((~behind).sum(axis=1) < 5))


def expected_calibration_error(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return how far confidence is from accuracy: 15 bins of equal width, weighted by images (arXiv 1706.04599).

    The confidence of an image is its largest probability. The bins divide (0, 1], each open below and closed above;
    the error is the mean over all images of |accuracy - mean confidence| of their bin, in [0, 1].

    Args:
        predictions: class probabilities [n, classes].
        references: true classes [n].
    """
    confidences = predictions.max(axis=1).astype(np.float64)
    gaps = (predictions.argmax(axis=1) == references) - confidences
    bins = np.digitize(confidences, np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1], right=True)
    return float(np.abs(np.bincount(bins, weights=gaps)).sum() / len(gaps))


METRICS: dict[str, ClassificationMetric] = {
    metric.name: metric
    for metric in (
        ClassificationMetric("accuracy", "Share of predicted classes that are right.", accuracy),
        ClassificationMetric(
            "mean_per_class_accuracy",
            "Accuracy within each class, averaged over the classes that have images.",
            mean_per_class_accuracy,
        ),
        ClassificationMetric(
            "top5_accuracy",
            "Share of images whose class is among the five largest logits.",
            top5_accuracy,
            takes="logits",
        ),
        ClassificationMetric(
            "expected_calibration_error",
            "Mean distance of confidence and accuracy over 15 confidence bins of equal width.",
            expected_calibration_error,
            takes="probabilities",
        ),
    )
}


def get_metric(name: str) -> ClassificationMetric:
    """Return the metric of that name.

    Raises:
        ValueError: there is none.
    """
    require("metrics", name, one_of(METRICS))
    return METRICS[name]


def load_metric(name: str) -> evaluate.Metric:
    """Return the metric of that name as a module of `evaluate`, like `evaluate.load`, but without a network.

    `load_metric("accuracy").compute(predictions=[...], references=[...])` returns `{"accuracy": ...}`.

    Raises:
        ValueError: there is none.
    """
    from .evaluate_module import EvaluateModule

    return EvaluateModule(get_metric(name))


def _logits(predictions: Any) -> np.ndarray:
    return np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)


def predicted_classes(predictions: Any) -> np.ndarray:
    """Return the classes [n] of the largest logits.

    Args:
        predictions: those of Trainer: logits [n, classes], or a tuple that starts with them.
    """
    return _logits(predictions).argmax(axis=-1)


def compute_metrics(eval_prediction: EvalPrediction, names: Sequence[str] = ("accuracy",)) -> dict[str, float]:
    """Compute metrics for `Trainer(compute_metrics=...)`; bind other names with `functools.partial`.

    Args:
        eval_prediction: logits [n, classes] (or a tuple that starts with them) and true classes [n], or class
            probabilities [n, classes], of which the largest counts.
        names: of `METRICS`.

    Returns:
        Each metric under its name.
    """
    logits = _logits(eval_prediction.predictions)
    references = np.asarray(eval_prediction.label_ids)
    references = references.argmax(axis=-1) if references.ndim == 2 else references
    views: dict[str, Any] = {"classes": predicted_classes(logits), "logits": logits}
    if any(METRICS[name].takes == "probabilities" for name in names):
        from scipy.special import softmax

        views["probabilities"] = softmax(logits.astype(np.float64), axis=-1)
    # Not `compute`, which would copy every logit into an arrow table first.
    return {name: METRICS[name].measure(views[METRICS[name].takes], references) for name in names}
