"""Compute metrics, as `evaluate` modules that need neither a network nor a cache folder.

A new metric is one entry in `METRICS`. Metrics are computed from all predictions at once: on several processes Trainer
gathers them first and drops the repeats that filled the last batch, so that the numbers equal those of one process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import datasets
import evaluate
import numpy as np
from scipy.special import softmax
from sklearn.metrics import accuracy_score, recall_score
from transformers import EvalPrediction

CALIBRATION_BINS = 15


class _Metric(evaluate.Metric):
    """Define a metric in memory by its name, its description and the kind of its predictions."""

    metric_name: ClassVar[str]
    description_text: ClassVar[str]
    takes: ClassVar[Literal["classes", "logits", "probabilities"]] = "classes"

    def __init__(self) -> None:
        # Nothing is written, but evaluate creates its folder first, and the usual cache may be read-only.
        super().__init__(keep_in_memory=True, cache_dir=tempfile.gettempdir())

    def _info(self) -> evaluate.MetricInfo:
        predicted = {
            "classes": "predicted classes [n]",
            "logits": "logits [n, classes]",
            "probabilities": "class probabilities [n, classes]",
        }[self.takes]
        one = datasets.Value("int64") if self.takes == "classes" else datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=self.description_text,
            citation="",
            inputs_description=f"predictions: {predicted}; references: true classes [n].",
            features=datasets.Features({"predictions": one, "references": datasets.Value("int64")}),
            # evaluate's own rule: rows of scores have no numpy format.
            format="numpy" if self.takes == "classes" else None,
        )

    def _compute(self, *, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {self.metric_name: self.measure(np.asarray(predictions), np.asarray(references))}

    @staticmethod
    def measure(predictions: np.ndarray, references: np.ndarray) -> float:
        """Compute the metric from predictions of kind `takes` and true classes [n]."""
        raise NotImplementedError


class Accuracy(_Metric):
    """Compute the share of correct predictions: `Accuracy().compute(predictions=[...], references=[...])`.

    The same metric as `evaluate.load("accuracy")`, which would have to be downloaded.
    """

    metric_name = "accuracy"
    description_text = "Share of predicted classes that are right."

    @staticmethod
    def measure(predictions: np.ndarray, references: np.ndarray) -> float:
        """Compute the share of equal entries of two vectors of classes [n]."""
        return float(accuracy_score(references, predictions))


class MeanPerClassAccuracy(_Metric):
    """Average the accuracy within each class, equally over the classes that have images.

    The metric of Flowers102 and Oxford-IIIT Pet in most transfer studies; scikit-learn's balanced accuracy.
    """

    metric_name = "mean_per_class_accuracy"
    description_text = "Accuracy within each class, averaged over the classes that have images."

    @staticmethod
    def measure(predictions: np.ndarray, references: np.ndarray) -> float:
        """Compute the mean recall from two vectors of classes [n]."""
        return float(recall_score(references, predictions, labels=np.unique(references), average="macro"))


class Top5Accuracy(_Metric):
    """Compute the share of images whose class is among the five largest logits; 1 with up to five classes.

    Of equal logits the one of the smaller class number counts as larger, as in `argmax`.
    """

    metric_name = "top5_accuracy"
    description_text = "Share of images whose class is among the five largest logits."
    takes = "logits"

    @staticmethod
    def measure(predictions: np.ndarray, references: np.ndarray) -> float:
        """Compute the share of rows of logits [n, classes] whose true class [n] is among the five largest."""
        true = np.take_along_axis(predictions, references[:, None], axis=1)
        is_earlier = np.arange(predictions.shape[1]) < references[:, None]
        # In this direction of the comparison a row of NaN is wrong.
        behind = (predictions < true) | ((predictions == true) & ~is_earlier)
        return float(np.mean((~behind).sum(axis=1) < 5))


class ExpectedCalibrationError(_Metric):
    """Compare confidence with accuracy over 15 bins of equal width, weighted by their images (arXiv 1706.04599).

    The confidence of an image is its largest probability. The bins divide (0, 1], each open below and closed above;
    the error is the mean over all images of |accuracy - mean confidence| of their bin, in [0, 1].
    """

    metric_name = "expected_calibration_error"
    description_text = "Mean distance of confidence and accuracy over 15 confidence bins of equal width."
    takes = "probabilities"

    @staticmethod
    def measure(predictions: np.ndarray, references: np.ndarray) -> float:
        """Compute the error of class probabilities [n, classes] for true classes [n]."""
        confidences = predictions.max(axis=1).astype(np.float64)
        gaps = (predictions.argmax(axis=1) == references) - confidences
        bins = np.digitize(confidences, np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1], right=True)
        return float(np.abs(np.bincount(bins, weights=gaps)).sum() / len(gaps))


METRICS: dict[str, type[_Metric]] = {
    metric.metric_name: metric for metric in (Accuracy, MeanPerClassAccuracy, Top5Accuracy, ExpectedCalibrationError)
}


def get_metric(name: str) -> type[_Metric]:
    """Look up a metric by its name.

    Raises:
        ValueError: there is none.
    """
    if name not in METRICS:
        raise ValueError(f"`metrics` has {name!r}; expected names out of {', '.join(METRICS)}.")
    return METRICS[name]


def _logits(predictions: Any) -> np.ndarray:
    return np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)


def predicted_classes(predictions: Any) -> np.ndarray:
    """Take the class of the largest logit, [n], of logits [n, classes] or of a tuple that starts with them."""
    return _logits(predictions).argmax(axis=-1)


def compute_metrics(eval_prediction: EvalPrediction, names: Sequence[str] = ("accuracy",)) -> dict[str, float]:
    """Compute metrics for `Trainer(compute_metrics=...)`; bind other names with `functools.partial`.

    Args:
        eval_prediction: logits [n, classes] (or a tuple that starts with them), and true classes [n] or class
            probabilities [n, classes], of which the largest counts.
        names: keys of `METRICS`.

    Returns:
        Name -> value of each metric.
    """
    logits = _logits(eval_prediction.predictions)
    references = np.asarray(eval_prediction.label_ids)
    references = references.argmax(axis=-1) if references.ndim == 2 else references
    views: dict[str, Any] = {"classes": predicted_classes(logits), "logits": logits}
    if any(METRICS[name].takes == "probabilities" for name in names):
        views["probabilities"] = softmax(logits.astype(np.float64), axis=-1)
    # Not `compute`, which would copy every logit into an arrow table first.
    return {name: METRICS[name].measure(views[METRICS[name].takes], references) for name in names}
