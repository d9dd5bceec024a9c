"""The `vpns-hf` command, called in process."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from helpers.hub_server import Fault
from helpers.models import tiny_backbone, tiny_model
from helpers.pictures import write_images
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import filter_repo_objects
from PIL import Image as PILImage
from transformers import AutoModelForImageClassification, ViTImageProcessor

from vpns_hf import PromptedSparseModel
from vpns_hf.cli import commands, main
from vpns_hf.cli.inspection import inspect_folder
from vpns_hf.data import load_transfer_dataset

NAMES = {0: "dark", 1: "bright"}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
COLOURS = [(30, 20, 10), (220, 230, 240)]


def subnetwork(**kwargs):
    return tiny_model(**(dict(id2label=NAMES, sparsity=0.75, scope="global") | kwargs))


@pytest.fixture
def folder(tmp_path):
    """What a run leaves: a frozen model, its processor, card and recipe, and much that is nobody else's business."""
    path = tmp_path / "run"
    model = subnetwork()
    model.freeze_masks()
    with torch.no_grad():
        for parameter in model.prompt.parameters():
            parameter.fill_(0.5)
    model.save_pretrained(path)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        path
    )
    result = EvalResult(
        "image-classification", "me/days", "days", "accuracy", 0.875, metric_name="accuracy", dataset_split="test"
    )
    card = ModelCardData(
        base_model="me/vit", datasets=["me/days"], license="mit", model_name="m", eval_results=[result]
    )
    ModelCard(f"---\n{card.to_yaml()}\n---\n# Days").save(path / "README.md")
    recipe = {"method": "vpns", "seed": 7, "dataset_name": "me/days", "token": None, "hub_token": "hf_secret"}
    (path / "recipe.yaml").write_text("# packages:\n#   torch: 2.9.0\n" + yaml.safe_dump(recipe))
    (path / "sparsity_report.json").write_text("{}")
    (path / "figures").mkdir()
    (path / "figures/prompt.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name in ("training_args.bin", "1-tune/checkpoint-3/optimizer.pt", "figures/notes.txt", "stages.json"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"private")
    return path


@pytest.fixture
def data(tmp_path):
    """Dark and bright images in turn."""
    features = Features({"image": Image(), "label": ClassLabel(names=list(NAMES.values()))})

    def split(count):
        labels = [index % 2 for index in range(count)]
        pictures = [PILImage.new("RGB", (40, 36), COLOURS[label]) for label in labels]
        return Dataset.from_dict({"image": pictures, "label": labels}, features=features)

    DatasetDict({"train": split(20), "test": split(10)}).save_to_disk(str(tmp_path / "data"))
    return tmp_path / "data"


# Usage ---------------------------------------------------------------------------------------------------------------


def test_the_package_brings_the_command():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["scripts"]["vpns-hf"].partition(":")
    assert getattr(import_module(module), name) is main


def test_it_runs_as_a_program(folder):
    run = subprocess.run(
        [sys.executable, "-m", "vpns_hf.cli", "inspect", str(folder), "--json"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["state"] == "frozen"


@pytest.mark.parametrize("command", ["inspect", "export", "push", "evaluate", "benchmark"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"vpns-hf {command} " in text.partition("Example")[2]
    assert len(text.splitlines()) > 12
    with pytest.raises(SystemExit):
        main(["--help"])
    assert command in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["inspect"],
        ["inspect", "a", "b"],
        ["export", "a", "b", "--format", "tflite"],
        ["export", "a", "b", "--with_prompt", "--without_prompt"],
        ["push", "a"],
        ["evaluate", "a"],
        ["evaluate", "a", "--dataset_name", "b", "--split", "dev"],
        ["evaluate", "a", "--dataset_name", "b", "--batch_size", "0"],
        ["benchmark"],
        ["benchmark", "a", "--batch", "0"],
        ["benchmark", "a", "--runtimes", "deepsparse"],
    ],
)
def test_wrong_usage_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: vpns-hf" in capsys.readouterr().err


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


# inspect -------------------------------------------------------------------------------------------------------------


def test_inspect_counts_what_the_masks_keep(folder, capsys):
    model = subnetwork()
    assert main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    report = model.sparsity_report()
    assert (found["kept"], found["total"]) == (report.kept, report.total)
    assert found["sparsity"] == pytest.approx(0.75, abs=1e-4)
    loaded = PromptedSparseModel.from_pretrained(folder)
    masks = sorted((int(mask.sum()), mask.numel()) for mask in loaded.masks().values())
    assert sorted((layer["kept"], layer["total"]) for layer in found["layers"]) == masks
    for layer in found["layers"]:
        assert layer["kept"] * 4 <= layer["bytes"] <= layer["kept"] * 4 + (layer["total"] + 7) // 8
        assert layer["coding"] in ("huffman", "bits", "gaps", "dense")
    assert found["files"] == {"model.safetensors": os.path.getsize(folder / "model.safetensors")}
    assert found["prompt"]["prompt"] == "pad"
    assert found["prompt"]["prompt_size"] == 4
    assert found["backbone"] == "vit"
    assert found["num_labels"] == 2
    assert found["provenance"] == {
        "base_model": "me/vit",
        "datasets": ["me/days"],
        "license": "mit",
        "results": {"accuracy on days, test": 0.875},
        "method": "vpns",
        "seed": 7,
        "dataset_name": "me/days",
        "packages": {"torch": "2.9.0"},
    }


def test_inspect_shows_tables(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    for text in ("vit.encoder.layer.0", "75.00%", "prompt: pad, prompt_size: 4", "me/vit", "vpns", "0.875", "bytes"):
        assert text in shown, shown
    assert "hf_secret" not in shown


@pytest.mark.parametrize("state", ["frozen", "search", "dense"])
def test_inspect_reads_checkpoints_that_are_not_packed(state, tmp_path):
    model = subnetwork()
    if state == "frozen":
        model.freeze_masks()
    elif state == "dense":
        model.detach_scores()
    model.save_pretrained(tmp_path, packed=False)
    found = inspect_folder(tmp_path)
    assert found.state == state
    masks = {} if state == "dense" else model.masks()
    assert sorted(layer.kept for layer in found.layers) == sorted(int(mask.sum()) for mask in masks.values())
    assert found.total == sum(mask.numel() for mask in masks.values())
    assert all(layer.name.endswith("weight") and layer.coding == "raw" for layer in found.layers)


@pytest.mark.parametrize("state", ["search", "frozen"])
def test_inspect_finds_masks_and_weights_in_different_shards(state, tmp_path):
    model = tiny_model("vit")
    if state == "frozen":
        model.freeze_masks()
    model.save_pretrained(tmp_path / "one", packed=False)
    model.save_pretrained(tmp_path / "shards", packed=False, max_shard_size="10KB")
    one, shards = (inspect_folder(tmp_path / name) for name in ("one", "shards"))
    assert len(shards.files) > 1
    assert sorted(shards.layers, key=str) == sorted(one.layers, key=str)


def test_inspect_neither_builds_nor_decodes(folder, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    config["backbone_config"]["model_type"] = "from-the-future"
    config["auto_map"] = {"AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('this was run')")
    monkeypatch.setattr("vpns_hf.storage.reading.load_packed", None)
    assert inspect_folder(folder).backbone == "from-the-future"


def test_inspect_lets_no_file_steer_the_terminal(folder, capsys):
    recipe = {"method": "vpns\x1b[2J", "dataset_name": "[red]days[/red]"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b[2J" not in shown
    assert "[red]days[/red]" in shown
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"method": "x" * 10_000}))
    assert main(["inspect", str(folder)]) == 0
    assert "x" * 301 not in capsys.readouterr().out.replace("\n", "").replace(" ", "")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "\x1b[2J"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", str(folder)])
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "config.json").unlink(), "holds no config.json"),
        (lambda path: (path / "config.json").write_text("{"), "is no sound JSON"),
        (lambda path: (path / "config.json").write_text("[]"), "is no JSON object"),
        (lambda path: (path / "config.json").write_text("{}"), "a model of type None, not a subnetwork"),
        (lambda path: (path / "config.json").write_text(" " * (2**24 + 1)), "takes more than"),
        (lambda path: (path / "README.md").write_bytes(b"x" * (2**20 + 1)), "takes more than"),
        (lambda path: (path / "README.md").write_text("---\na: &x [1]\nb: *x\n---\n"), "it has an alias"),
        (lambda path: (path / "recipe.yaml").write_text("a: &x [1]\nb: *x\n"), "it has an alias"),
        (lambda path: (path / "recipe.yaml").write_bytes(b"\xff"), "recipe.yaml is no UTF-8 text"),
        (lambda path: os.mkfifo(path / "model-2.safetensors"), "is no regular file"),
        (lambda path: (path / "model.safetensors").write_text(POINTER), "git lfs pull"),
        (lambda path: tiny_backbone("vit").save_pretrained(path), "a model of type 'vit', not a subnetwork"),
        (lambda path: (path / "model.safetensors").unlink(), r"holds no model\*\.safetensors"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 99), "model.safetensors is damaged"),
        (lambda path: os.truncate(path / "model.safetensors", 9000), "model.safetensors is damaged"),
        (lambda path: (path / "recipe.yaml").write_text("a: ["), "recipe.yaml is no sound YAML"),
    ],
)
def test_inspect_says_what_is_wrong(change, message, folder, capsys):
    change(folder)
    line = failure(["inspect", folder], capsys)
    assert line.startswith("vpns-hf inspect: ")
    assert re.search(message, line), line


# Repositories on the Hub ---------------------------------------------------------------------------------------------


def test_a_repository_is_fetched_without_what_is_not_published(folder, monkeypatch, capsys):
    calls = []

    def snapshot_download(repo_id, **kwargs):
        calls.append((repo_id, kwargs))
        return str(folder)

    monkeypatch.setattr(commands, "snapshot_download", snapshot_download)
    assert main(["inspect", "me/days-90", "--revision", "v1", "--token", "hf_x", "--json"]) == 0
    ((repo_id, kwargs),) = calls
    assert (repo_id, kwargs["revision"], kwargs["token"]) == ("me/days-90", "v1", "hf_x")
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    fetched = set(filter_repo_objects(files, allow_patterns=kwargs["allow_patterns"]))
    assert fetched == {
        "README.md",
        "config.json",
        "figures/prompt.png",
        "model.safetensors",
        "preprocessor_config.json",
        "recipe.yaml",
        "sparsity_report.json",
    }


def test_a_repository_is_read_like_a_folder(hub, folder, capsys):
    assert main(["push", str(folder), "me/days-90"]) == 0
    capsys.readouterr()
    found = []
    for name in (str(folder), "me/days-90"):
        assert main(["inspect", name, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]


def test_a_repository_that_cannot_be_read_is_one_sentence(hub, capsys):
    assert "Could not read me/nothing: there is no such repository" in failure(["inspect", "me/nothing"], capsys)
    assert "no local folder, and no Hub id" in failure(["inspect", "./nowhere/at/all"], capsys)
    hub.faults.append(Fault())
    assert "Could not read me/nothing" in failure(["inspect", "me/nothing"], capsys)


# export --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_export_writes_a_stock_model_with_its_processor(folder, tmp_path, capsys):
    assert main(["export", str(folder), str(tmp_path / "plain")]) == 0
    assert str(tmp_path / "plain") in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "plain")) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "plain")
    images = torch.rand(2, 3, 32, 32)
    expected = PromptedSparseModel.from_pretrained(folder)(images).logits
    torch.testing.assert_close(plain(images).logits, expected)


def test_export_as_onnx(folder, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    arguments = ["export", str(folder), str(tmp_path / "model.onnx"), "--format", "onnx", "--with_prompt"]
    assert main([*arguments, "--opset", "18"]) == 0
    images = torch.rand(4, 3, 32, 32)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"pixel_values": images.numpy()})
    model = PromptedSparseModel.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(images, use_prompt=True).logits)


def test_export_refuses_what_cannot_be_exact(folder, tmp_path, capsys):
    assert "overlaps the image" in failure(["export", folder, tmp_path / "plain", "--with_prompt"], capsys)
    line = failure(["export", folder, tmp_path / "plain", "--format", "timm"], capsys)
    assert "which timm cannot load; use `--format transformers`" in line
    assert "is not empty" in failure(["export", folder, folder], capsys)
    assert not (tmp_path / "plain").exists()


def test_export_of_a_timm_backbone(tmp_path):
    timm = pytest.importorskip("timm")
    model = subnetwork(backbone="timm_resnet")
    model.freeze_masks()
    model.save_pretrained(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "plain"), "--format", "timm"]) == 0
    assert timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).num_classes == 2


# push ----------------------------------------------------------------------------------------------------------------


def test_push_uploads_what_is_published_in_one_commit(hub, folder, capsys):
    (folder / "optimizer.pt").write_bytes(b"pickle")
    assert main(["push", str(folder), "me/days-90", "--private", "--commit_message", "First"]) == 0
    assert "me/days-90" in capsys.readouterr().out
    assert set(hub.files("me/days-90")) == {
        "README.md",
        "config.json",
        "figures/prompt.png",
        "model.safetensors",
        "preprocessor_config.json",
        "recipe.yaml",
        "sparsity_report.json",
    }
    repository = hub.repositories["models", "me/days-90"]
    assert repository.private
    assert repository.refs["refs/heads/main"].title == "First"
    (folder / "sparsity_report.json").write_text('{"layers": []}')
    assert main(["push", str(folder), "me/days-90", "--create_pr"]) == 0
    assert "refs/pr/1" in repository.refs


def test_push_of_nothing_touches_no_repository(tmp_path, hub, capsys):
    assert "holds no saved model" in failure(["push", tmp_path, "me/x"], capsys)
    assert "holds no saved model" in failure(["push", tmp_path / "missing", "me/x"], capsys)
    assert not hub.repositories


def test_push_that_is_refused_is_one_sentence(hub, folder, capsys):
    assert "Could not push to you/days" in failure(["push", folder, "you/days"], capsys)


# evaluate ------------------------------------------------------------------------------------------------------------


def by_hand(folder, data, use_prompt):
    """Accuracy on the test split by a plain loop."""
    model = PromptedSparseModel.from_pretrained(folder)
    processor = ViTImageProcessor.from_pretrained(folder)
    split = DatasetDict.load_from_disk(str(data))["test"]
    right = 0
    for row in split:
        pixel_values = processor(row["image"], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            right += int(model(pixel_values, use_prompt=use_prompt).logits.argmax()) == row["label"]
    return right / len(split)


def tell_apart(folder):
    """A model whose head tells dark from bright images, and whose prompt makes all of them white."""
    model = subnetwork(prompt="lowrank", prompt_size=1)
    model.freeze_masks()
    with torch.no_grad():
        head = model.backbone.classifier
        features = [
            model.backbone.vit(torch.full((1, 3, 32, 32), value)).last_hidden_state[0, 0] for value in (-0.9, 0.8)
        ]
        direction = features[1] - features[0]
        head.weight.copy_(torch.stack([-direction, direction]))
        middle = float(direction @ (features[0] + features[1])) / 2
        head.bias.copy_(torch.tensor([middle, -middle]))
        for parameter in model.prompt.parameters():
            parameter.fill_(1.0)
    model.save_pretrained(folder)


def test_evaluate_measures_without_and_with_the_prompt(folder, data, capsys):
    tell_apart(folder)
    assert main(["evaluate", str(folder), "--dataset_name", str(data), "--batch_size", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == by_hand(folder, data, False) == 1.0
    assert found["accuracy_prompted"] == by_hand(folder, data, True) == 0.5
    assert (found["split"], found["images"]) == ("test", 10)


def test_evaluate_shows_a_table(folder, data, capsys):
    tell_apart(folder)
    assert main(["evaluate", str(folder), "--dataset_name", str(data), "--split", "validation"]) == 0
    shown = capsys.readouterr().out
    assert "100.00%" in shown
    assert "validation" in shown


def test_evaluate_without_a_prompt(tmp_path, data, capsys):
    model = subnetwork(prompt=None)
    model.freeze_masks()
    model.save_pretrained(tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run"), "--dataset_name", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy_prompted"] is None


def test_evaluate_matches_classes_by_name(folder, data, tmp_path, capsys):
    tell_apart(folder)
    splits = DatasetDict.load_from_disk(str(data))
    swapped = ClassLabel(names=["bright", "dark"])
    splits = splits.map(lambda row: {"label": 1 - row["label"]}).cast_column("label", swapped)
    splits.save_to_disk(str(tmp_path / "swapped"))
    assert main(["evaluate", str(folder), "--dataset_name", str(tmp_path / "swapped"), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["accuracy"] == 1.0
    splits.cast_column("label", ClassLabel(names=["a", "b"])).save_to_disk(str(tmp_path / "others"))
    assert main(["evaluate", str(folder), "--dataset_name", str(tmp_path / "others"), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["accuracy"] == 0.0
    assert "they are matched by number" in captured.err


def test_evaluate_on_another_task_is_refused(folder, tmp_path, capsys):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    rows = {"image": [PILImage.fromarray(pixels)] * 30, "label": [0, 1, 2] * 10}
    split = Dataset.from_dict(rows, features=features)
    DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "data"))
    line = failure(["evaluate", folder, "--dataset_name", tmp_path / "data"], capsys)
    assert "The model tells 2 classes apart and the data set has 3" in line


def test_evaluate_on_data_that_is_not_there(folder, tmp_path, capsys):
    assert "missing" in failure(["evaluate", folder, "--dataset_name", tmp_path / "missing"], capsys)


def test_evaluate_uses_all_images_of_a_folder_without_splits(folder, tmp_path, capsys):
    tell_apart(folder)
    for name, value in (("dark", 20), ("bright", 230)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(7):
            pixels = np.full((8, 8, 3), value + index, dtype=np.uint8)
            PILImage.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    for split in ("test", "validation"):
        command = ["evaluate", str(folder), "--dataset_name", str(tmp_path / "images"), "--split", split, "--json"]
        assert main(command) == 0
        assert json.loads(capsys.readouterr().out)["images"] == 14


def test_evaluate_takes_the_carved_split_that_a_run_selected_on(folder, data, capsys):
    tell_apart(folder)
    command = ["evaluate", str(folder), "--dataset_name", str(data), "--split", "validation", "--json"]
    assert main([*command, "--validation_fraction", "0.5", "--split_seed", "7"]) == 0
    split = load_transfer_dataset(data, validation_fraction=0.5, seed=7)["validation"]
    assert json.loads(capsys.readouterr().out)["images"] == len(split)


@pytest.mark.parametrize(
    "flags",
    [
        ["--image_column_name", "picture"],
        ["--label_column_name", "kind"],
        ["--train_split", "training"],
        ["--validation_split", "dev"],
        ["--test_split", "final"],
        ["--test_split", "train"],
        ["--split", "validation", "--validation_fraction", "0.01"],
        ["--dataset_name", "images", "--dataset_config_name", "one"],
        ["--dataset_name", "images", "--dataset_revision", "main"],
        ["--dataset_name", "images", "--test_split", "final"],
        ["--dataset_name", "columns"],
    ],
    ids=" ".join,
)
def test_errors_of_evaluate_name_flags_that_it_has(flags, folder, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", 2)
    Dataset.from_dict({"a": [1, 2], "b": [3, 4]}).save_to_disk(str(tmp_path / "columns"))
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", str(folder), "--dataset_name", str(data), *flags])
    line = capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    known = capsys.readouterr().out
    named = re.findall(r"--\w+", line) + re.findall(r"\b\w+_(?:split|fraction|column_name)\b", line)
    assert named
    assert [flag for flag in named if flag not in known] == []
