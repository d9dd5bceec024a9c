"""Tests of `vpns_hf.metrics`: by hand, by scikit-learn, in shards and on two processes."""

import json
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
from helpers.models import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.special import softmax
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from transformers import EvalPrediction

from vpns_hf import VPNsTrainer, VPNsTrainingArguments
from vpns_hf.metrics import (
    METRICS,
    compute_metrics,
    expected_calibration_error,
    load_metric,
    top5_accuracy,
)


@pytest.fixture(autouse=True)
def unusable_cache(monkeypatch, tmp_path):
    """A home in which no cache folder can be made, and an `evaluate.load` that must not be called."""
    (tmp_path / "file").touch()
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(evaluate, "load", None)


def test_accuracy_is_an_evaluate_metric():
    metric = load_metric("accuracy")
    assert isinstance(metric, evaluate.Metric)
    assert metric.compute(predictions=[0, 1, 1, 2], references=[0, 1, 2, 2]) == {"accuracy": 0.75}


def test_accuracy_adds_up_batches_and_starts_again():
    metric = load_metric("accuracy")
    for _ in range(2):
        metric.add_batch(predictions=[0, 0], references=[0, 1])
        metric.add(prediction=1, reference=0)
        metric.add(prediction=1, reference=1)
        assert metric.compute() == {"accuracy": 0.5}


def test_mean_per_class_accuracy():
    # Class 0: 3 of 4, class 1: 0 of 1, class 3: 1 of 1; class 2 has no image and is only predicted.
    metric = load_metric("mean_per_class_accuracy")
    result = metric.compute(predictions=[0, 0, 0, 1, 2, 3], references=[0, 0, 0, 0, 1, 3])
    assert result == {"mean_per_class_accuracy": pytest.approx((3 / 4 + 0 + 1) / 3)}


def test_top5_accuracy():
    logits = [
        [7, 6, 5, 4, 3, 2, 1],  # the fifth largest is class 4
        [7, 6, 5, 4, 3, 2, 1],
        [1, 1, 1, 1, 1, 1, 1],  # of equal ones the first count
        [1, 1, 1, 1, 1, 1, 1],
    ]
    metric = load_metric("top5_accuracy")
    assert metric.compute(predictions=logits, references=[4, 5, 4, 5]) == {"top5_accuracy": 0.5}
    assert metric.compute(predictions=[[3, 2, 1]], references=[2]) == {"top5_accuracy": 1.0}
    assert top5_accuracy(np.full((2, 7), np.nan), np.array([0, 6])) == 0


def test_expected_calibration_error():
    # Confidences 0.9 (right), 0.9 (wrong), 0.6 (right): two bins, |1 / 2 - 0.9| of two images and |1 - 0.6| of one.
    probabilities = [[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]]
    result = load_metric("expected_calibration_error").compute(predictions=probabilities, references=[0, 1, 1])
    assert result == {"expected_calibration_error": pytest.approx((2 * 0.4 + 0.4) / 3)}
    # 15 bins of equal width, closed above: 0.6 = 9 / 15 ends the ninth, so 0.601 is in another bin, and 0.599 is not.
    one, other, near = [0.6, 0.4], [0.601, 0.399], [0.599, 0.401]
    apart = expected_calibration_error(np.array([one, other]), np.array([0, 1]))
    assert apart == pytest.approx((0.4 + 0.601) / 2)
    together = expected_calibration_error(np.array([one, near]), np.array([0, 1]))
    assert together == pytest.approx(abs(1 - 0.6 + 0 - 0.599) / 2)
    assert expected_calibration_error(np.array([[0.0, 1.0]] * 3), np.array([1, 1, 1])) == 0


def calibration_by_loop(probabilities, labels):
    total = 0.0
    for index in range(15):
        confidence = probabilities.max(axis=1)
        inside = (confidence > index / 15) & (confidence <= (index + 1) / 15)
        if inside.any():
            right = probabilities[inside].argmax(axis=1) == labels[inside]
            total += inside.mean() * abs(right.mean() - confidence[inside].mean())
    return total


@settings(max_examples=30, deadline=None)
@given(
    logits=arrays.arrays(np.float64, st.tuples(st.integers(1, 40), st.just(8)), elements=st.floats(-9, 9)),
    seed=st.integers(0, 99),
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # classes that were only predicted
def test_second_computations(logits, seed):
    labels = np.random.default_rng(seed).integers(0, 8, len(logits))
    logits += 1e-6 * np.arange(8)  # scikit-learn breaks ties the other way round
    results = compute_metrics(EvalPrediction(logits, labels), list(METRICS))
    predicted = logits.argmax(axis=1)
    assert results["accuracy"] == pytest.approx(np.mean(predicted == labels))
    assert results["mean_per_class_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert results["top5_accuracy"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5, labels=range(8)))
    assert results["expected_calibration_error"] == pytest.approx(calibration_by_loop(softmax(logits, axis=1), labels))


@pytest.mark.parametrize("name", METRICS)
def test_uneven_shards_add_up(name):
    """As gathered from processes whose last batches differ in size."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(23, 6)).astype(np.float32), rng.integers(0, 6, 23)
    expected = compute_metrics(EvalPrediction(logits, labels), [name])
    views = {"classes": logits.argmax(axis=1), "logits": logits, "probabilities": softmax(logits, axis=1)}
    predictions, metric = views[METRICS[name].takes], load_metric(name)
    for start, stop in ((0, 8), (8, 16), (16, 22), (22, 23)):
        metric.add_batch(predictions=predictions[start:stop], references=labels[start:stop])
    assert metric.compute() == {name: pytest.approx(expected[name], abs=1e-6)}
    assert metric.name == name


@pytest.mark.parametrize("as_tuple", [False, True])
def test_compute_metrics(as_tuple):
    logits = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]])
    predictions = (logits, np.zeros(4)) if as_tuple else logits
    result = compute_metrics(EvalPrediction(predictions=predictions, label_ids=np.array([0, 1, 1, 1])))
    assert result == {"accuracy": 0.75}
    assert type(result["accuracy"]) is float


def test_metrics_are_chosen_by_the_arguments(tmp_path):
    data = [{"pixel_values": np.full((3, 32, 32), index / 9, np.float32), "labels": index % 6} for index in range(9)]
    settings = dict(use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False)
    args = VPNsTrainingArguments(str(tmp_path), metrics=list(METRICS)[1:], **settings)
    trainer = VPNsTrainer(tiny_model("vit"), args, eval_dataset=data)
    metrics, logits = trainer.evaluate(), trainer.predict(data).predictions
    expected = compute_metrics(EvalPrediction(logits, np.array([row["labels"] for row in data])), list(METRICS))
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value)
        assert f"eval_{name}_prompted" in metrics
    with pytest.raises(
        ValueError, match=r"`metrics` is \['top_5'\]; expected None or a list of names out of accuracy, mean_per_class"
    ):
        VPNsTrainingArguments(str(tmp_path), metrics=["top_5"], **settings)


TWO_PROCESSES = """
import json, sys
import numpy as np
from accelerate import PartialState
from helpers.models import tiny_model
from vpns_hf import VPNsTrainer, VPNsTrainingArguments
from vpns_hf.metrics import METRICS

rng = np.random.default_rng(0)
data = [
    {"pixel_values": rng.normal(size=(3, 32, 32)).astype("float32"), "labels": int(rng.integers(6))} for _ in range(13)
]
args = VPNsTrainingArguments(
    sys.argv[1], metrics=list(METRICS), per_device_eval_batch_size=4, use_cpu=True,
    report_to="none", disable_tqdm=True, dataloader_pin_memory=False, seed=0,
)
metrics = VPNsTrainer(tiny_model("vit"), args, eval_dataset=data).evaluate()
names = [f"eval_{name}{suffix}" for name in METRICS for suffix in ("", "_prompted")]
state = PartialState()
if state.is_main_process:
    print(json.dumps({"processes": state.num_processes} | {name: metrics[name] for name in names}))
if state.num_processes > 1:
    state.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_with_an_uneven_last_batch(tmp_path):
    """13 images in batches of 4 on two processes: the last round has five images, three of which are padding."""
    script = tmp_path / "measure.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[2])\nimport torch; torch.manual_seed(0)" + TWO_PROCESSES
    )
    results = []
    for launch in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]):
        command = [sys.executable, *launch, str(script), str(tmp_path / "out"), str(Path(__file__).parent)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert ended.returncode == 0, ended.stderr
        results.append(json.loads(ended.stdout.splitlines()[-1]))
    one, two = results
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert two == pytest.approx(one)
