"""Recipe parsing, and the recipe itself from end to end on tiny data."""

import json
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from models import tiny_backbone
from PIL import Image as PILImage
from transformers import ViTImageProcessor, pipeline

import vpns_hf
from vpns_hf import PromptedSparseModel, VPNsTrainingArguments
from vpns_hf.recipe import DataArguments, ModelArguments, parse_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
CLASSES = (ModelArguments, DataArguments, VPNsTrainingArguments)


@dataclass
class Small:
    name: str = field(metadata={"help": "a name"})
    rate: float = 1.0
    steps: int = 3
    flag: bool = False


def write(folder, **content):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    path = write(tmp_path, name="yaml", rate="5e-3", flag=True)
    (parsed,) = parse_recipe((Small,), ["--config", str(path), "--name", "flag"])
    assert parsed == Small(name="flag", rate=5e-3, steps=3, flag=True)
    (parsed,) = parse_recipe((Small,), ["--steps", "4"], default_config=path)
    assert parsed == Small(name="yaml", rate=5e-3, steps=4, flag=True)


def test_paths_in_yaml_are_relative_to_the_file(tmp_path):
    path = write(tmp_path, name="../model")
    (parsed,) = parse_recipe((Small,), ["--config", str(path)])
    assert parsed.name == str(tmp_path.parent / "model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "a", "--stepps", "3"], "unknown argument 'stepps'; did you mean 'steps'"),
        (["--name", "a", "--zzz", "3"], "unknown argument 'zzz'; `--help`"),
        (["--config"], "needs the path"),
        (["--config", "nothing.yaml"], "cannot be read"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe((Small,), arguments)


def test_wrong_yaml_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown key 'ratte'; did you mean 'rate'"):
        parse_recipe((Small,), ["--config", str(write(tmp_path, name="a", ratte=2))])
    (tmp_path / "recipe.yaml").write_text("just a sentence")
    with pytest.raises(ValueError, match="key: value"):
        parse_recipe((Small,), ["--config", str(tmp_path / "recipe.yaml")])
    (tmp_path / "recipe.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="no valid YAML"):
        parse_recipe((Small,), ["--config", str(tmp_path / "recipe.yaml")])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses(path, tmp_path):
    flags = ["--bf16", "false", "--output_dir", str(tmp_path), "--use_cpu"]
    model, data, args = parse_recipe(CLASSES, ["--config", str(path), *flags])
    assert model.model_name_or_path
    assert data.dataset_name
    assert 0 < args.sparsity < 1


@pytest.fixture
def task(tmp_path):
    """A folder with a tiny pretrained ViT and one with images whose brightness tells the class."""
    tiny_backbone("vit").save_pretrained(tmp_path / "backbone")
    size = {"height": 32, "width": 32}
    ViTImageProcessor(size=size, image_mean=[0.4] * 3, image_std=[0.3] * 3).save_pretrained(tmp_path / "backbone")
    features = Features({"image": Image(), "label": ClassLabel(names=["dark", "grey", "bright"])})
    rng = np.random.default_rng(0)

    def rows(count):
        for index in range(count):
            pixels = rng.integers(0, 80, (28, 28)) + 80 * (index % 3)
            yield {"image": PILImage.fromarray(pixels.astype(np.uint8)), "label": index % 3}

    splits = {name: Dataset.from_list(list(rows(n)), features=features) for name, n in (("train", 60), ("test", 30))}
    DatasetDict(splits).save_to_disk(tmp_path / "data")
    return tmp_path


def run(task, *flags):
    script = RECIPES / "prune_vit.py"
    config = write(
        task,
        model_name_or_path="./backbone",
        dataset_name="./data",
        output_dir="./out",
        prompt_size=4,
        sparsity=0.8,
        search_epochs=1,
        num_train_epochs=2,
        score_learning_rate=1e-2,
        optim="adamw_torch",
        learning_rate=3e-3,
        per_device_train_batch_size=10,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=2,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        report_to="none",
        use_cpu=True,
    )
    arguments, sys.argv = sys.argv, [str(script), "--config", str(config), *flags]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = arguments


def test_recipe_from_end_to_end(task, capsys):
    run(task)
    out, printed = task / "out", capsys.readouterr().out
    assert "Test split, 30 images" in printed
    assert printed.count("[stage ") == 5  # warm-up, search, tune; warm-up and tune of the dense reference
    files = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "recipe.yaml", "metrics.json"} <= files
    assert {"sparsity_report.json", "results.md", "figures", "stages.json"} <= files
    assert {path.name for path in (out / "figures").iterdir()} == {"density.png", "training.png", "prompt.png"}
    assert not list(out.rglob("*.bin"))

    model = PromptedSparseModel.from_pretrained(out)
    assert model.sparsity == pytest.approx(0.8, abs=1e-3)
    assert model.config.id2label == {0: "dark", 1: "grey", 2: "bright"}
    metrics = json.loads((out / "metrics.json").read_text())
    rows = {row["name"]: row for row in metrics["test"]}
    assert list(rows) == ["dense fine-tuned", "vpns before tuning", "vpns after tuning"]
    assert rows["dense fine-tuned"]["steps"] == rows["vpns after tuning"]["steps"]
    assert rows["vpns after tuning"]["file_bytes"] < rows["dense fine-tuned"]["file_bytes"] / 2

    # The pipeline, the loaded model and the trainer agree.
    test = Dataset.load_from_disk(task / "data/test")
    processor = ViTImageProcessor.from_pretrained(out)
    images = [image.convert("RGB") for image in test["image"]]
    with torch.no_grad():
        logits = model(**processor(images, return_tensors="pt")).logits
    predicted = [model.config.id2label[int(index)] for index in logits.argmax(-1)]
    assert [entry[0]["label"] for entry in pipeline("image-classification", model=str(out))(images)] == predicted
    names = [model.config.id2label[label] for label in test["label"]]
    share = np.mean([name == label for name, label in zip(names, predicted, strict=True)])
    assert share == pytest.approx(rows["vpns after tuning"]["accuracy"])

    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["score_learning_rate"] == 1e-2
    assert recipe["seed"] == 42
    assert f"vpns-hf: {vpns_hf.__version__}" in (out / "recipe.yaml").read_text()

    with pytest.raises(SystemExit, match="holds an earlier run"):
        run(task)
    before = (out / "model.safetensors").read_bytes()
    run(task, "--resume_from_checkpoint", "true")
    assert (out / "model.safetensors").read_bytes() == before


def test_recipe_says_what_is_wrong_in_one_line(task):
    for flags, message in (
        (["--sparsity", "1.2"], "`sparsity` is 1.2"),
        (["--model_name_or_path", str(task / "data")], "no local folder with a transformers or timm config.json"),
        (["--label_column_name", "colour"], "colour"),
        (["--prompt_size", "40"], "`prompt_size` is 40"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(task, *flags)
