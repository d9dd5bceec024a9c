"""Recipe parsing, and the recipe itself from end to end on tiny data."""

import json
import re
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from helpers.recipes import RECIPES, add_controls, failure, run, write
from huggingface_hub import ModelCard
from transformers import ViTImageProcessor, pipeline

import vpns_hf
from vpns_hf import PromptedSparseModel, VPNsTrainingArguments
from vpns_hf.cli.inspection import inspect_folder
from vpns_hf.experiments import DataArguments, ModelArguments, parse_recipe
from vpns_hf.experiments.compare import ComparisonArguments
from vpns_hf.experiments.results import read_results
from vpns_hf.experiments.tables import comparison_markdown, summary_markdown

CLASSES = (ModelArguments, DataArguments, VPNsTrainingArguments)


@dataclass
class Small:
    name: str = field(metadata={"help": "a name"})
    rate: float = 1.0
    steps: int = 3
    flag: bool = False


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
        (["--config"], "expected one argument"),
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
    with pytest.raises(ValueError, match="no sound YAML"):
        parse_recipe((Small,), ["--config", str(tmp_path / "recipe.yaml")])


def test_recipe_from_end_to_end(task, capsys, monkeypatch):
    run(task, "--references", "dense", "vpns_zero_prompt", "--license", "mit", metrics=["expected_calibration_error"])
    out, printed = task / "out", capsys.readouterr().out
    assert "Test split, 30 images" in printed
    # warm-up, search, tune; the same of the control; no search of the dense one
    assert len(re.findall(r"^\[stage .*: \d+ steps, ", printed, re.MULTILINE)) == 8
    files = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "recipe.yaml", "metrics.json"} <= files
    assert {"sparsity_report.json", "results.md", "figures", "stages.json", "README.md", "card.json"} <= files
    figures = {"density.png", "training.png", "prompt.png", "confusion.png"}
    assert {path.name for path in (out / "figures").iterdir()} == figures
    assert not list(out.rglob("*.bin"))

    model = PromptedSparseModel.from_pretrained(out)
    assert model.sparsity == pytest.approx(0.8, abs=1e-3)
    assert model.config.id2label == {0: "dark", 1: "grey", 2: "bright"}
    metrics = json.loads((out / "metrics.json").read_text())
    rows = {row["name"]: row for row in metrics["test"]}
    names = ["dense after tuning", "vpns_zero_prompt after tuning", "vpns before tuning", "vpns after tuning"]
    assert list(rows) == names
    assert len({rows[name]["steps"] for name in names if name != "vpns before tuning"}) == 1
    assert rows["vpns after tuning"]["file_bytes"] < rows["dense after tuning"]["file_bytes"] / 2
    assert [name for name in names if rows[name]["milliseconds"] is None] == ["vpns before tuning"]
    last = " ".join(printed.split())
    assert re.search(r"On this machine \(.*\) the pruned model is \d\.\d times smaller \(.* ms an image", last)
    assert all(0 <= row["expected_calibration_error"] <= 1 for row in rows.values())
    assert "expected_calibration_error_prompted" in rows["vpns after tuning"]

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

    card = ModelCard.load(out / "README.md")
    assert card.data.eval_results[0].metric_value == pytest.approx(rows["vpns after tuning"]["accuracy"], abs=1e-6)
    assert f"30 images of the test split of {task.name}/data" in card.text
    assert "| search | head: adamw_torch at 0.003, prompt: adam at 0.0001, scores: adam at 0.01 |" in card.text
    assert card.data.license == "mit"
    assert all((out / figure).is_file() for figure in re.findall(r"!\[.*?\]\((.*?)\)", card.text))
    monkeypatch.chdir(task)
    code = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len(code) == 2
    for block in code:
        exec(block, {})

    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["score_learning_rate"] == 1e-2
    assert recipe["seed"] == 42
    assert f"vpns-hf: {vpns_hf.__version__}" in (out / "recipe.yaml").read_text()

    assert "holds an earlier run" in failure(lambda: run(task), capsys)
    before = (out / "model.safetensors").read_bytes()
    run(task, "--resume_from_checkpoint", "true")
    assert (out / "model.safetensors").read_bytes() == before


def test_recipe_runs_a_method_without_a_search_and_without_references(task):
    (task / "backbone/README.md").write_text("---\nlicense: cc-by-4.0\n---\n# A backbone\n")
    (task / "data/README.md").write_text("---\npretty_name: Greys\nlicense: cc0-1.0\nsource: drawn\n---\n")
    run(task, "--method", "omp", "--references", "none")
    rows = json.loads((task / "out/metrics.json").read_text())["test"]
    assert [row["name"] for row in rows] == ["omp after tuning"]
    card = ModelCard.load(task / "out/README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.eval_results[0].dataset_name == "Greys"
    assert "30 images of the test split of Greys, with the last weights.\nSource of the data: drawn.\n" in card.text
    assert "Licence of the data: cc0-1.0.\n" in card.text
    assert inspect_folder(task / "out").provenance["results"].keys() == {"accuracy on Greys, test"}


def test_recipe_names_its_data_set(task, capsys):
    (task / "data/README.md").write_text("---\npretty_name: 3\n---\n")
    line = failure(lambda: run(task, "--method", "omp", "--references", "none"), capsys)
    assert re.search(r"`pretty_name` in .* is 3; expected text", line)
    assert not (task / "out").exists()
    (task / "data/README.md").write_text("---\npretty_name: Greys\n---\n")
    run(task, "--method", "omp", "--references", "none", "--dataset_title", "My greys")
    assert ModelCard.load(task / "out/README.md").data.eval_results[0].dataset_name == "My greys"
    assert inspect_folder(task / "out").provenance["dataset_title"] == "My greys"


def test_recipe_says_what_is_wrong_in_one_line(task, capsys):
    for flags, message in (
        (["--sparsity", "1.2"], "`sparsity` is 1.2"),
        (["--model_name_or_path", str(task / "data")], "no local folder with a transformers or timm config.json"),
        (["--label_column_name", "colour"], "colour"),
        (["--prompt_size", "40"], "`prompt_size` is 40"),
    ):
        line = failure(lambda flags=flags: run(task, *flags), capsys)
        assert line.startswith("prune_vit.py: ")
        assert message in line


def compare(task, *flags):
    settings = dict(total_max_steps=4, head_warm_up_epochs=0.2, calibration_images_per_class=3, mix_unaugmented=True)
    cells = dict(methods=["dense", "vpns", "omp+prompt"], sparsities=[0.8, 0.5], seeds=[1, 2])
    run(task, *flags, script="compare_methods.py", **settings, **cells)
    return (task / "out/results.jsonl").read_text().splitlines()


def test_comparison_from_end_to_end(task, capsys):
    lines = compare(task)
    results = [json.loads(line) for line in lines]
    cells = [(result["method"], result["sparsity"], result["seed"]) for result in results]
    assert cells == [("dense", 0.0, seed) for seed in (1, 2)] + [
        (method, sparsity, seed) for sparsity in (0.8, 0.5) for method in ("vpns", "omp+prompt") for seed in (1, 2)
    ]
    assert {result["steps"] for result in results} == {4}
    assert {result["images"] for result in results} == {(4 + result["warm_up_steps"]) * 10 for result in results}
    assert all(abs(result["measured_sparsity"] - result["sparsity"]) < 1e-3 for result in results)
    assert all(result["accuracy_prompted"] is not None for result in results if result["method"] != "dense")
    assert len({result["settings"] for result in results}) == 1
    assert not (task / "out/cells").exists()
    table = (task / "out/results.md").read_text()
    assert "`omp+prompt`: One-shot magnitude" in table
    assert (task / "out/accuracy.png").stat().st_size > 10_000

    # Cells that are there are skipped; one that a kill has cut off is run again and comes out the same.
    capsys.readouterr()
    path = task / "out/results.jsonl"
    path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])
    again = [json.loads(line) for line in compare(task) if "cut off" not in line]
    assert capsys.readouterr().out.count("[cell ") == 1
    assert [result | {"seconds": 0} for result in again] == [result | {"seconds": 0} for result in results]

    assert "cells of other settings" in failure(lambda: compare(task, "--learning_rate", "0.5"), capsys)
    compare(task, "--only_report", "true", "--methods", "vpns", "hydra")
    assert "hydra" in (task / "out/results.md").read_text()


def test_comparison_goes_on_in_the_middle_of_a_cell(task, monkeypatch):
    """Killed after the search of a cell: its finished stages are kept, and the line is that of the whole run."""
    whole = [json.loads(line) for line in compare(task, "--methods", "vpns", "--sparsities", "0.8", "--seeds", "1")]
    (task / "out/results.jsonl").unlink()
    train_stage = vpns_hf.VPNsTrainer._train_stage

    def stop_after_search(self, plan, *args, **kwargs):
        output = train_stage(self, plan, *args, **kwargs)
        if plan.name == "search":
            raise KeyboardInterrupt
        return output

    monkeypatch.setattr(vpns_hf.VPNsTrainer, "_train_stage", stop_after_search)
    with pytest.raises(SystemExit, match="130"):
        compare(task, "--methods", "vpns", "--sparsities", "0.8", "--seeds", "1")
    monkeypatch.setattr(vpns_hf.VPNsTrainer, "_train_stage", train_stage)
    assert not (task / "out/results.jsonl").exists()
    resumed = [json.loads(line) for line in compare(task, "--methods", "vpns", "--sparsities", "0.8", "--seeds", "1")]
    assert resumed[0] | {"seconds": 0} == whole[0] | {"seconds": 0}


def test_comparison_refuses_unknown_methods(task, capsys):
    assert "`method` is 'hydro'" in failure(lambda: compare(task, "--methods", "hydro"), capsys)


@pytest.mark.parametrize("name", ["demo", "imagenet", "all_methods", "all_methods_imagenet"])
def test_committed_comparison_is_what_its_lines_say(name, tmp_path):
    """The table is made from `results.jsonl`, whose cells are of the setting and counted alike."""
    folder = RECIPES / "comparison" / name
    config = RECIPES / "comparison" / f"{name}.yaml"
    add_controls()
    *_, wanted = parse_recipe((*CLASSES, ComparisonArguments), ["--config", str(config)])
    results = read_results(folder / "results.jsonl")
    assert {result.cell for result in results} <= set(wanted.cells())
    assert len({result.settings for result in results}) == 1
    trained = [result for result in results if result.method not in ("wanda", "sparsegpt")]
    assert len({(result.steps, result.warm_up_steps, result.images) for result in trained}) <= 2
    summary = summary_markdown(results, wanted.methods, sorted(wanted.sparsities))
    written = (folder / "results.md").read_text(encoding="utf-8")
    assert written.startswith(summary)
    assert comparison_markdown(results, wanted.methods, sorted(wanted.sparsities)) in written


def test_references_at_another_sparsity(task):
    """Each in its own folder; what differs between rows is read from the models."""
    run(task, method="omp", sparsity=0.8, references=["omp@0.5", "dense"], max_steps=2)
    rows = json.loads((task / "out/metrics.json").read_text())["test"]
    assert [(row["name"], round(row["sparsity"], 3)) for row in rows] == [
        ("omp after tuning", 0.5),
        ("dense after tuning", 0.0),
        ("omp after tuning", 0.8),
    ]
    assert PromptedSparseModel.from_pretrained(task / "out/omp@0.5").sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("dens", "expected one of dense, "),
        ("omp@half", "'omp@half'; expected a method, or a method at another sparsity, such as 'vpns@0.9'"),
        ("omp@1.0", r"`references` is 1.0; expected a fraction in \[0, 1\)"),
    ],
)
def test_wrong_references_are_refused_before_training(task, capsys, reference, message):
    assert re.search(message, failure(lambda: run(task, references=[reference]), capsys))
    assert not (task / "out").exists()
