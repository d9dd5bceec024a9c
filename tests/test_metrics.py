"""Tests of `vpns_hf.metrics`."""

import evaluate
import numpy as np
import pytest
from transformers import EvalPrediction

from vpns_hf.metrics import Accuracy, compute_accuracy


@pytest.fixture(autouse=True)
def unusable_cache(monkeypatch, tmp_path):
    """A home in which no cache folder can be made, and an `evaluate.load` that must not be called."""
    (tmp_path / "file").touch()
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(evaluate, "load", None)


def test_accuracy_is_an_evaluate_metric():
    metric = Accuracy()
    assert isinstance(metric, evaluate.Metric)
    assert metric.compute(predictions=[0, 1, 1, 2], references=[0, 1, 2, 2]) == {"accuracy": 0.75}


def test_accuracy_adds_up_batches_and_starts_again():
    metric = Accuracy()
    for _ in range(2):
        metric.add_batch(predictions=[0, 0], references=[0, 1])
        metric.add(prediction=1, reference=0)
        metric.add(prediction=1, reference=1)
        assert metric.compute() == {"accuracy": 0.5}


@pytest.mark.parametrize("as_tuple", [False, True])
def test_compute_accuracy(as_tuple):
    logits = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]])
    predictions = (logits, np.zeros(4)) if as_tuple else logits
    result = compute_accuracy(EvalPrediction(predictions=predictions, label_ids=np.array([0, 1, 1, 1])))
    assert result == {"accuracy": 0.75}
    assert type(result["accuracy"]) is float
