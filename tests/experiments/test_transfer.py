"""`recipes/transfer.py` from end to end on tiny data: masks found on one task, tuned on two others."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from helpers.models import tiny_backbone
from helpers.recipes import RECIPES, failure, run_script
from PIL import Image as PILImage
from transformers import AutoModelForImageClassification, ViTImageProcessor

import vpns_hf
from vpns_hf import PromptedSparseModel
from vpns_hf.experiments.results import Cell, read_results
from vpns_hf.experiments.results import claim as claim_cell
from vpns_hf.experiments.tables import transfer_markdown

SCRIPT = RECIPES / "transfer.py"


def write_task(folder: Path, names: list[str], seed: int) -> None:
    """Images whose brightness tells the class."""
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    rng = np.random.default_rng(seed)

    def rows(count):
        for index in range(count):
            pixels = rng.integers(0, 60, (28, 28)) + 190 // len(names) * (index % len(names))
            yield {"image": PILImage.fromarray(pixels.astype(np.uint8)), "label": index % len(names)}

    splits = {name: Dataset.from_list(list(rows(n)), features=features) for name, n in (("train", 48), ("test", 24))}
    DatasetDict(splits).save_to_disk(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny pretrained ViT, a source task and two targets with other numbers of classes."""
    folder = tmp_path_factory.mktemp("made")
    tiny_backbone("vit").save_pretrained(folder / "backbone")
    size = {"height": 32, "width": 32}
    ViTImageProcessor(size=size, image_mean=[0.4] * 3, image_std=[0.3] * 3).save_pretrained(folder / "backbone")
    for seed, (task, classes) in enumerate((("source", 3), ("left", 2), ("right", 4))):
        write_task(folder / task, [f"{task}-{index}" for index in range(classes)], seed)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def run(folder, *flags, how=run_script, **settings):
    """Run the recipe in a folder and return its lines."""
    defaults = dict(
        model_name_or_path="./backbone",
        new_head=True,
        prompt_size=4,
        dataset_name="./source",
        targets=["./left", "./right"],
        methods=["dense", "vpns", "omp"],
        sparsities=[0.8],
        seeds=[1],
        search_max_steps=4,
        max_steps=3,
        head_warm_up_epochs=0.4,
        score_learning_rate=1e-1,
        search_prompt_learning_rate=1e-2,
        optim="adamw_torch",
        learning_rate=3e-3,
        prompt_learning_rate=1e-2,
        mix_unaugmented=True,
        output_dir="./out",
        per_device_train_batch_size=8,
        eval_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        report_to="none",
        use_cpu=True,
    )
    config = folder / "recipe.yaml"
    config.write_text(yaml.safe_dump(defaults | settings))
    how(SCRIPT.name, ["--config", config, *flags])
    lines = folder / "out/results.jsonl"
    return [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []


def timeless(lines):
    return [line | {"seconds": 0} for line in lines]


@pytest.fixture
def keep_models(monkeypatch):
    """The models of all trainers, as they were when their first and after their last stage, by output folder."""
    kept = {}
    train = vpns_hf.VPNsTrainer.train

    def keep(self, *args, **kwargs):
        before = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        output = train(self, *args, **kwargs)
        kept[Path(self.args.output_dir).name.rsplit("-", 1)[0]] = (before, self.model)
        return output

    monkeypatch.setattr(vpns_hf.VPNsTrainer, "train", keep)
    return kept


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def changed(before, model):
    """Parts of the model that training moved: the head, the prompt, other layers."""
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    return {name.split(".")[1 if name.startswith("backbone.") else 0] for name in moved}


def prompt_of(state):
    return {name: tensor for name, tensor in state.items() if name.startswith("prompt.")}


def subnetworks(folder):
    """What was found, by method and task."""
    return {tuple(path.name.split("-")[:4:3]): path for path in (folder / "out/subnetworks").iterdir()}


def test_masks_move_and_weights_do_not(folder, keep_models):
    lines = run(folder)
    cells = [(line["task"], line["method"], line["mode"]) for line in lines]
    assert cells == [(task, method, "full") for task in ("left", "right") for method in ("dense", "vpns", "omp")]
    assert len({line["settings"] for line in lines}) == 2  # one a target
    for line in lines:
        assert line["steps"] == 3
        assert line["mask_steps"] == {"dense": None, "vpns": 4, "omp": 0}[line["method"]]
        assert line["measured_sparsity"] == pytest.approx(0 if line["method"] == "dense" else 0.8, abs=1e-3)
        assert line["accuracy_prompted"] is None

    # Found once each, for both targets; the data-free one trains no head.
    found = {key: PromptedSparseModel.from_pretrained(path) for key, path in subnetworks(folder).items()}
    assert found.keys() == {("vpns", "source"), ("omp", "source")}
    assert found["vpns", "source"].config.num_labels == 3
    pretrained = AutoModelForImageClassification.from_pretrained(folder / "backbone").state_dict()
    for task, classes in (("left", 2), ("right", 4)):
        for method in ("vpns", "omp"):
            before, after = keep_models[f"{method}-0.8-1-{task}-full"]
            assert after.config.num_labels == classes
            masks = found[method, "source"].masks()
            assert same(after.masks(), masks)
            for name, weight in pretrained.items():
                if "classifier" not in name:
                    kept = masks.get(name, torch.tensor(True))
                    assert torch.equal(before[f"backbone.{name}"], weight * kept), name
            assert changed(before, after) == {"vit", "classifier"}
        assert all(mask.all() for mask in keep_models[f"dense-0-1-{task}-full"][1].masks().values())

    # The table says what the lines say.
    table = (folder / "out/results.md").read_text()
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.split("## ")[0].splitlines()]
    assert ["method", "left (%)", "right (%)", "vs dense (points, mean of the tasks)"] in rows
    accuracy = {(line["task"], line["method"]): 100 * line["accuracy"] for line in lines}
    dense = [accuracy[task, "dense"] for task in ("left", "right")]
    for method in ("vpns", "omp"):
        ours = [accuracy[task, method] for task in ("left", "right")]
        assert [method, *(f"{value:.2f}" for value in ours), f"{(sum(ours) - sum(dense)) / 2:+.2f}"] in rows
    assert "## left" in table
    assert "`full`: All kept weights and the head" in table


def test_modes_and_a_mask_and_a_prompt_from_two_tasks(folder, keep_models):
    modes = ["full_source_prompt", "full_other_prompt", "linear_probe", "prompt_only"]
    lines = run(folder, targets=["./left"], methods=["vpns"], modes=modes, prompt_dataset_name="./right")
    assert [line["mode"] for line in lines] == modes
    assert [line["accuracy_prompted"] is not None for line in lines] == [True, True, False, True]
    found = {key: PromptedSparseModel.from_pretrained(path) for key, path in subnetworks(folder).items()}
    source, other = found["vpns", "source"], found["vpns", "right"]
    assert not same(source.masks(), other.masks())
    assert not same(prompt_of(source.state_dict()), prompt_of(other.state_dict()))
    for mode, prompt, trained in (
        ("full_source_prompt", source, {"vit", "classifier", "prompt"}),
        ("full_other_prompt", other, {"vit", "classifier", "prompt"}),
        ("linear_probe", None, {"classifier"}),
        ("prompt_only", None, {"classifier", "prompt"}),
    ):
        before, after = keep_models[f"vpns-0.8-1-left-{mode}"]
        assert same(after.masks(), source.masks())
        assert changed(before, after) == trained
        if prompt is None:
            assert not any(tensor.any() for tensor in prompt_of(before).values())
        else:
            assert same(prompt_of(before), prompt_of(prompt.state_dict()))

    table = (folder / "out/results.md").read_text()
    assert f"| vpns, prompt_only, with its prompt | {100 * lines[-1]['accuracy_prompted']:.2f} |" in table


def test_killed_between_and_within_cells(folder, monkeypatch, capsys):
    settings = dict(targets=["./left"], methods=["vpns", "dense"])
    whole = run(folder, **settings)
    shutil.rmtree(folder / "out")
    train_stage, stages = vpns_hf.VPNsTrainer._train_stage, []

    def stop(self, plan, *args, **kwargs):
        output = train_stage(self, plan, *args, **kwargs)
        stages.append(plan.name)
        if len(stages) == stop.after:
            raise KeyboardInterrupt
        return output

    monkeypatch.setattr(vpns_hf.VPNsTrainer, "_train_stage", stop)
    # vpns: warm-up and search on the source, warm-up and tuning on the target; dense: the latter.
    for stop.after in (1, 2, 3, 4, 5):
        with pytest.raises(SystemExit, match="130"):
            run(folder, **settings)
    stop.after = None
    assert timeless(run(folder, **settings)) == timeless(whole)
    assert stages == ["warm_up", "search", "warm_up", "tune", "warm_up", "tune"]  # none twice
    assert not (folder / "out/cells").exists()

    # Lines without their subnetworks: what is done needs none.
    shutil.rmtree(folder / "out/subnetworks")
    assert timeless(run(folder, **settings)) == timeless(whole)
    assert not (folder / "out/subnetworks").exists()

    assert "cells of other settings" in failure(lambda: run(folder, "--learning_rate", "0.5", **settings), capsys)
    run(folder, "--only_report", "true", "--methods", "vpns", **settings)
    assert "right" not in (folder / "out/results.md").read_text()


def test_another_launch_is_waited_for(folder, monkeypatch):
    """A subnetwork that another launch is finding is not found twice."""
    settings = dict(targets=["./left"], methods=["vpns"])
    lines = run(folder, **settings)
    (found,) = subnetworks(folder).values()
    found.rename(folder / "elsewhere")
    (folder / "out/results.jsonl").unlink()
    # Its process: holds the claim, then ends with the subnetwork in place.
    claim = claim_cell(folder / "out", Cell("vpns", 0.8, 1, "source", "find"))
    assert claim.__enter__()
    waited = []

    def finish(self):
        waited.append(True)
        (folder / "elsewhere").rename(found)
        claim.__exit__(None, None, None)

    monkeypatch.setattr("vpns_hf.experiments.runner.CellRunner.wait", finish)
    assert timeless(run(folder, **settings)) == timeless(lines)
    assert waited == [True]


def test_a_shared_subnetwork_needs_no_source(folder, keep_models, capsys):
    # Its head was pruned with it; the fresh heads of the targets are not.
    shared = PromptedSparseModel.from_backbone(str(folder / "backbone"), sparsity=0.75, prompt=None)
    shared.freeze_masks()
    shared.save_pretrained(folder / "shared")
    settings = dict(dataset_name="", methods=["dense", "omp", "random"], sparsities=None, targets=["./left"])
    lines = run(folder, "--subnetwork", str(folder / "shared"), **settings)
    assert [(line["method"], line["sparsity"]) for line in lines] == [
        ("subnetwork", 0.75),
        ("dense", 0.0),
        ("omp", 0.75),
        ("random", 0.75),
    ]
    moved = keep_models["subnetwork-0.75-1-left-full"][1].masks()
    assert "classifier.weight" in shared.masks()
    assert moved.keys() == shared.masks().keys() - {"classifier.weight"}
    assert all(torch.equal(mask, shared.masks()[name]) for name, mask in moved.items())
    assert lines[0]["mask_steps"] is None
    table = (folder / "out/results.md").read_text()
    assert "**75% sparse**" in table

    other = settings | dict(output_dir="./other")
    line = failure(lambda: run(folder, "--methods", "vpns", **other), capsys)
    assert "masks of vpns are found on a source task; name it with `--dataset_name`" in line
    flags = ("--subnetwork", str(folder / "shared"), "--modes", "full_source_prompt")
    assert "has no prompt" in failure(lambda: run(folder, *flags, **other), capsys)


def test_the_source_keeps_the_head_of_the_backbone(folder, keep_models):
    """As for ImageNet: identity on the source, frequency mapping on the target, the head pruned in both."""
    write_task(folder / "six", [f"six-{index}" for index in range(6)], 5)  # as many classes as the backbone has
    lines = run(
        folder,
        dataset_name="./six",
        targets=["./right"],
        methods=["vpns"],
        new_head=None,
        label_mapping="frequency",
        keep_source_head=True,
        identity_source_head=True,
        validation_fraction=0.2,
    )
    (found,) = subnetworks(folder).values()
    source = PromptedSparseModel.from_pretrained(found)
    assert source.config.label_mapping is None
    assert not source.config.new_head
    assert "classifier.weight" in source.masks()
    target = keep_models["vpns-0.8-1-right-full"][1]
    assert target.config.label_mapping_state == "final"
    assert len(set(target.config.mapped_labels)) == 4
    assert same(target.masks(), source.masks())
    assert lines[0]["warm_up_steps"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(targets=[]), "`targets` is empty"),
        (dict(modes=["whole"]), "`modes` is ['whole']; expected a list of names out of full,"),
        (dict(methods=["subnetwork"]), "say which with `--subnetwork`"),
        (dict(methods=["omp+prompt"]), "finds no mask of its own"),
        (dict(sparsities=[90]), "`sparsities` is [90]; expected None or a list of fractions"),
        (dict(modes=["full_other_prompt"]), "needs either `--prompt_subnetwork` or `--prompt_dataset_name`"),
        (dict(targets=["./left", "./out/../left"]), "Two targets are called 'left'"),
        (dict(eval_prompt="with"), "compared without the prompt"),
    ],
)
def test_wrong_settings_are_named(folder, settings, message, capsys):
    (folder / "out").mkdir()
    assert message in failure(lambda: run(folder, **settings), capsys)
    assert not list((folder / "out").iterdir())


def test_committed_tables_are_what_their_lines_say():
    folder = SCRIPT.parent / "transfer"
    settings = yaml.safe_load((folder / "demo.yaml").read_text(encoding="utf-8"))
    results = read_results(folder / "demo/results.jsonl")
    targets = [Path(target).name for target in settings["targets"]]
    cells = {(result.method, result.seed, result.task) for result in results}
    assert cells == {(m, seed, t) for m in settings["methods"] for seed in settings["seeds"] for t in targets}
    assert len({(result.task, result.settings) for result in results}) == len(targets)
    assert {result.steps for result in results} == {settings["max_steps"]}
    table = transfer_markdown(results, targets, settings["methods"], settings["sparsities"])
    assert (folder / "demo/results.md").read_text(encoding="utf-8").startswith(table)
