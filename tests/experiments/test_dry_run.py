"""Every recipe and every backbone and task of the paper, built up to the first optimizer step and no further.

Hub ids are answered by a local cache that holds, under the real ids, tiny members of the same model types and tiny
data sets with the columns, splits and classes of the table's rows.
"""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from datasets.packaged_modules.parquet.parquet import Parquet
from helpers.models import SWIN, TRANSFORMER, tiny_model
from helpers.recipes import RECIPES, run_script
from PIL import Image as PILImage
from safetensors.torch import save_file
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from vpns_hf import VPNsTrainer, VPNsTrainingArguments
from vpns_hf.data import TRANSFER_TASKS

TASKS = ("cifar10", "cifar100", "tiny_imagenet", "dtd", "flowers102", "stanford_cars", "oxford_pets", "food101")
BACKBONES = {
    "timm/resnet18.tv_in1k": "resnet/resnet18_cifar100.yaml",
    "timm/resnet50.tv2_in1k": "resnet/resnet50_tiny_imagenet.yaml",
    "timm/vgg16.tv_in1k": "vgg/vgg16_tiny_imagenet.yaml",
    "google/vit-base-patch16-224": "vit/vit_base_cifar100.yaml",
    "facebook/deit-small-patch16-224": "deit/deit_small_cifar100.yaml",
    "microsoft/swin-tiny-patch4-window7-224": "swin/swin_tiny_cifar100.yaml",
}
REVISION = "0" * 40
# As large as the prompts of the recipes need.
SIZE = 64
TIMM = {"resnet18": ("test_resnet", {}), "resnet50": ("test_resnet", {}), "vgg16": ("vgg11", {"mlp_ratio": 0.01})}
TRANSFORMERS = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**TRANSFORMER | {"image_size": SIZE}, num_labels=1000)),
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**TRANSFORMER | {"image_size": SIZE}, num_labels=1000)),
    "swin": lambda: SwinForImageClassification(SwinConfig(**SWIN | {"image_size": SIZE}, num_labels=1000)),
}


def add_model(cache: Path, name: str) -> None:
    """A repository as the Hub's client caches it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(REVISION)
    kind = re.split(r"[.-]", name.partition("/")[2])[0]
    if kind in TIMM:
        architecture, options = TIMM[kind]
        model = timm.create_model(architecture, num_classes=1000, **options)
        images = {"input_size": [3, SIZE, SIZE], "mean": [0.4] * 3, "std": [0.3] * 3, "num_classes": 1000}
        config = {"architecture": architecture, "num_classes": 1000, "pretrained_cfg": images, "model_args": options}
        (snapshot / "config.json").write_text(json.dumps(config))
        save_file(model.state_dict(), snapshot / "model.safetensors")
    else:
        TRANSFORMERS[kind]().save_pretrained(snapshot)
        ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(snapshot)


def add_data(cache: Path, key: str) -> None:
    """A data set as `datasets` keeps what it has once downloaded."""
    task = TRANSFER_TASKS[key]
    features = Features(
        {task.image: Image(), task.label: ClassLabel(names=[f"class {index}" for index in range(task.num_classes)])}
    )
    buffer = io.BytesIO()
    PILImage.fromarray(np.random.default_rng(0).integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(buffer, "PNG")
    files = {}
    for split in filter(None, (task.train, task.validation, task.test)):
        labels = [index % 2 * (task.num_classes - 1) for index in range(40)]
        rows = {task.image: [{"bytes": buffer.getvalue(), "path": None}] * 40, task.label: labels}
        path = cache / f"{key}-{split}.parquet"
        Dataset.from_dict(rows, features=features).to_parquet(path)
        files[split] = [str(path)]
    owner, name = task.path.split("/")
    built = Parquet(str(cache), config_name=task.name, dataset_name=name, hash=REVISION, data_files=files)
    built.download_and_prepare()
    # What comes from the Hub is cached under the owner's name, and its configuration without a hash of its files.
    configuration = Path(built.cache_dir).parents[1]
    configuration.rename(configuration.with_name(task.name or "default"))
    configuration.parent.rename(cache / f"{owner}___{configuration.parent.name}")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    for name in BACKBONES:
        add_model(folder, name)
    for key in (*TASKS, "imagenet_1k"):
        add_data(folder, key)
    return folder


def dry_run(monkeypatch, capsys, tmp_path, cache, script, *flags):
    """What the recipe prints; it must train nothing and leave nothing behind."""

    def refuse(*args, **kwargs):
        raise AssertionError("a dry run must not get here")

    monkeypatch.setattr(VPNsTrainer, "train", refuse)
    monkeypatch.setattr(VPNsTrainer, "save_model", refuse)
    monkeypatch.setenv("COLUMNS", "200")
    output = tmp_path / "out"
    common = ("--dry_run", "true", "--cache_dir", cache, "--output_dir", output, "--bf16", "false", "--use_cpu")
    run_script(script, (*common, *flags))
    assert not output.exists()
    return capsys.readouterr().out


def values(printed):
    """The rows of the tables, by their first column."""
    return {cells[0]: cells[1:] for cells in (re.split(r"\s{2,}", line.strip()) for line in printed.splitlines())}


def check_pair(monkeypatch, capsys, tmp_path, cache, backbone, key):
    config = RECIPES / BACKBONES[backbone]
    assert yaml.safe_load(config.read_text())["model_name_or_path"] == backbone
    facts = values(
        dry_run(monkeypatch, capsys, tmp_path, cache, "prune_vit.py", "--config", config, "--dataset_name", key)
    )
    task = TRANSFER_TASKS[key]
    mapped = yaml.safe_load(config.read_text()).get("label_mapping") is not None
    assert facts["backbone"][0].startswith(backbone)
    assert facts["classes"] == [f"{task.num_classes}" + ("" if mapped else " (new head)")]
    assert facts["train images"] == ["40" if task.validation else "36"]
    assert facts["images a step"][0].startswith(f"{task.paper.batch_size} = ")
    assert facts["metrics"] == [", ".join(task.metrics)]
    assert f"weights: {task.paper.optim} at {task.paper.learning_rate:g}" in facts["joint"][0]
    assert "scores: adam at auto" in facts["joint"][0]
    assert ("warm up" in facts) != mapped


@pytest.mark.parametrize(
    ("backbone", "key"), [*zip(BACKBONES, TASKS, strict=False), ("timm/resnet18.tv_in1k", "food101")]
)
def test_backbones_and_tasks(monkeypatch, capsys, tmp_path, cache, backbone, key):
    check_pair(monkeypatch, capsys, tmp_path, cache, backbone, key)


@pytest.mark.slow
@pytest.mark.parametrize("key", TASKS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_on_every_task(monkeypatch, capsys, tmp_path, cache, backbone, key):
    check_pair(monkeypatch, capsys, tmp_path, cache, backbone, key)


def scripts():
    for path in sorted(RECIPES.glob("*/*.yaml")):
        if path.parent.name == "accelerate_configs":
            continue
        script = {"comparison": "compare_methods.py", "transfer": "transfer.py"}.get(path.parent.name, "prune_vit.py")
        name = f"{path.parent.name}-{path.stem}"
        is_slow = name in ("comparison-resnet18_cifar100", "transfer-resnet18_imagenet")
        yield pytest.param(path, script, id=name, marks=[pytest.mark.slow] if is_slow else [])


@pytest.mark.parametrize(("path", "script"), list(scripts()))
def test_every_recipe(monkeypatch, capsys, tmp_path, cache, path, script):
    flags = []
    settings = yaml.safe_load(path.read_text())
    if "imagenet/assets" in path.read_text():
        # Folders that are no part of the repository.
        digits = RECIPES / "transfer/data/digits"
        flags = ["--targets" if script == "transfer.py" else "--dataset_name", digits]
    if "imagenet/assets" in settings["model_name_or_path"]:
        flags += ["--model_name_or_path", RECIPES / "demo/model", "--image_size", "32", "--prompt_size", "4"]
    printed = dry_run(monkeypatch, capsys, tmp_path, cache, script, "--config", path, *flags)
    assert {"tune", "joint"} & set(values(printed))
    if script == "compare_methods.py":
        assert all(f"{method}\n" in re.sub(r" +\n", "\n", printed) for method in settings["methods"])
    if script == "transfer.py":
        for mode in settings["modes"]:
            assert f"vpns, {mode}" in printed


@pytest.mark.parametrize("steps", [{"max_steps": 3}, {"total_max_steps": 7}, {"num_train_epochs": 0.5}], ids=str)
def test_planned_steps_are_the_steps_taken(tmp_path, steps):
    data = [{"pixel_values": np.full((3, 32, 32), index / 9, np.float32), "labels": index % 3} for index in range(9)]
    settings = {
        "method": "vpns",
        "search_epochs": 1,
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 2,
        "use_cpu": True,
    } | steps
    args = VPNsTrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        **settings,
    )
    trainer = VPNsTrainer(tiny_model("vit", num_labels=3, new_head=True), args, train_dataset=data)
    planned = trainer.planned_stages()
    trainer.train()
    assert planned == trainer.stage_settings()
