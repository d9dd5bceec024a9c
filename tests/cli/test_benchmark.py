"""`vpns-hf benchmark`, in process; the runtimes run in processes of their own."""

import importlib.util
import json
import os
import shutil

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from helpers.models import tiny_model
from huggingface_hub import ModelCard
from PIL import Image as PILImage
from transformers import ViTImageProcessor

from vpns_hf import PromptedSparseModel
from vpns_hf.cli import main
from vpns_hf.hub import published_files
from vpns_hf.latency import LatencyReport

NAMES = {0: "dark", 1: "bright"}
QUICK = ["--rounds", "3", "--batch", "1", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A frozen model that gives dark and bright images different classes, with its image processor and card."""
    path = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = tiny_model(sparsity=0.75, scope="global", id2label=NAMES)
    model.freeze_masks()
    model.save_pretrained(path)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        path
    )
    model.short_card("Days", [], base_model="me/vit").save(path / "README.md")
    return path


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


@pytest.fixture
def data(tmp_path):
    """Noise, so that some images are of the class that the model gives them and some are not."""
    features = Features({"image": Image(), "label": ClassLabel(names=list(NAMES.values()))})
    generator = np.random.default_rng(0)

    def split(count):
        pictures = [PILImage.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
        return Dataset.from_dict({"image": pictures, "label": [i % 2 for i in range(count)]}, features=features)

    DatasetDict({"train": split(20), "test": split(12)}).save_to_disk(str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def no_openvino(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("vpns_hf.latency.runtimes.find_spec", lambda name: None if name == "openvino" else find(name))


def failure(arguments, capsys):
    """The one line on stderr of a command that fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def by_hand(folder, data):
    """Accuracy on the test split by a plain loop."""
    model, processor = PromptedSparseModel.from_pretrained(folder), ViTImageProcessor.from_pretrained(folder)
    split = DatasetDict.load_from_disk(str(data))["test"]
    with torch.no_grad():
        right = [
            int(model(**processor(row["image"], return_tensors="pt")).logits.argmax()) == row["label"] for row in split
        ]
    return sum(right) / len(right)


def test_every_runtime_that_is_installed_is_measured(folder, data, no_openvino, capsys):
    pytest.importorskip("onnxruntime")
    assert main(["benchmark", str(folder), "--dataset_name", str(data), "--save", "--json", *QUICK]) == 0
    report = LatencyReport.from_dict(json.loads(capsys.readouterr().out))
    runtimes = ["torch", "sparse", "onnxruntime", "onnxruntime-int8"]
    assert [(row.runtime, row.batch, row.threads) for row in report.rows] == [
        (name, batch, 1) for batch in (1, 2) for name in runtimes
    ]
    assert report.left_out == {"openvino": "not installed (openvino)"}
    assert all(len(row.seconds) == 3 and min(row.seconds) > 0 for row in report.rows)
    assert all(row.memory_bytes > 0 for row in report.rows if os.path.exists("/proc/self/status"))
    sizes = {row.runtime: row.file_bytes for row in report.rows}
    assert sizes["sparse"] == (folder / "model.safetensors").stat().st_size
    plain = PromptedSparseModel.from_pretrained(folder).merge_and_unload()
    assert sizes["torch"] == 4 * sum(parameter.numel() for parameter in plain.parameters())
    assert sizes["onnxruntime-int8"] < sizes["onnxruntime"]
    accuracies = {row.runtime: row.accuracy for row in report.rows}
    for name in runtimes[:3]:
        assert accuracies[name] == by_hand(folder, data), name
    assert accuracies["onnxruntime-int8"] in [count / 12 for count in range(13)]
    assert report.int8 == "static"
    assert report.accuracy_of == f"{data}, test split, 12 images"
    # What is saved is what was measured, a push would publish it, and the card shows it.
    assert LatencyReport.from_dict(json.loads((folder / "latency.json").read_text())) == report
    assert {"latency.json", "figures/latency.png"} <= set(published_files(folder))
    card = ModelCard.load(folder / "README.md").text
    assert card.index("## Use") < card.index("## Latency") < card.index("## Limits")
    assert "faster than the dense one in onnxruntime" in card


def test_a_table_with_what_is_missing_below_it(folder, monkeypatch, no_openvino, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    before = sorted(os.listdir(folder))
    names = ["--runtimes", "torch", "sparse", "openvino"]
    assert main(["benchmark", str(folder), *names, "--rounds", "2", "--batch", "1", "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    for text in ("speed-up", "Measured on", "Not measured: openvino, not installed (openvino)."):
        assert text in shown, shown
    assert "onnxruntime" not in shown
    assert sorted(os.listdir(folder)) == before


def test_a_runtime_that_cannot_run_the_model_is_left_out_with_the_reason(folder, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr("vpns_hf.latency.benchmark.export_onnx", fail)
    names = ["--runtimes", "torch", "onnxruntime", "onnxruntime-int8", "--json"]
    assert main(["benchmark", str(folder), *names, "--rounds", "2", "--batch", "1", "--threads", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["runtime"] for row in found["rows"]} == {"torch"}
    assert found["left_out"] == dict.fromkeys(names[2:4], "RuntimeError: no such operator")


def test_refusals_are_one_sentence_before_anything_runs(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vpns_hf.latency.benchmark.runtime_processes", None)
    assert "is no local folder; download it first" in failure(["benchmark", "me/days-90", "--save"], capsys)
    assert f"`threads` has {10**6}, and this machine has" in failure(["benchmark", folder, "--threads", 10**6], capsys)
    assert "rounds at least 2" in failure(["benchmark", folder, "--rounds", 1], capsys)
    search = tmp_path / "search"
    tiny_model().save_pretrained(search)
    assert "in the 'search' state" in failure(["benchmark", search], capsys)


def test_nothing_left_to_measure(folder, no_openvino, capsys):
    line = failure(["benchmark", folder, "--runtimes", "openvino", "--threads", 1], capsys)
    assert line.endswith("No runtime could be measured: openvino: not installed (openvino).")
