"""Recipes choose precision, workers and pinned memory for the machine; what is asked for is not changed."""

import warnings

import pytest
import torch
import yaml
from helpers.recipes import RECIPES, failure, run_command, run_script, write

from vpns_hf import VPNsTrainingArguments
from vpns_hf.experiments import machine, parse_recipe

CHOSEN = ("bf16", "dataloader_num_workers", "dataloader_pin_memory")


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU that computes in bf16, and 16 cores."""
    monkeypatch.setattr(machine, "is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(machine, "cpu_count", lambda: 16)


def parsed(tmp_path, *flags, **recipe):
    recipe = {"output_dir": str(tmp_path / "out"), "report_to": "none"} | recipe
    (args,) = parse_recipe((VPNsTrainingArguments,), ["--config", str(write(tmp_path, **recipe)), *flags])
    return tuple(getattr(args, name) for name in CHOSEN)


def everything(**given):
    return machine.choose(dict.fromkeys(CHOSEN, "auto") | given)


def test_a_machine_without_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "cpu_count", lambda: 2)
    recipe = dict.fromkeys(CHOSEN, "auto")
    assert parsed(tmp_path, **recipe) == (False, 1, False)
    assert capsys.readouterr().out == (
        "Chosen for this machine (no GPU, CPU cores for each process: 2): --bf16 false --dataloader_num_workers 1 "
        "--dataloader_pin_memory false\n"
    )
    monkeypatch.setattr(machine, "cpu_count", lambda: 1)
    assert parsed(tmp_path, **recipe)[1] == 0


def test_a_machine_with_a_gpu(gpu, monkeypatch):
    assert everything() == {"bf16": True, "dataloader_num_workers": 4, "dataloader_pin_memory": True}
    assert not everything(fp16=True)["bf16"]
    for given in ({"use_cpu": True}, {"use_cpu": "true"}):
        assert everything(**given) == {"bf16": False, "dataloader_num_workers": 4, "dataloader_pin_memory": False}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert everything()["dataloader_num_workers"] == 1
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert not everything()["bf16"]


def test_flags_win_and_may_be_auto_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "cpu_count", lambda: 8)
    recipe = dict.fromkeys(CHOSEN, "auto")
    assert parsed(tmp_path, "--dataloader_num_workers", "0", "--dataloader_pin_memory", "true", **recipe) == (
        *(False, 0, True),
    )
    assert parsed(tmp_path, "--dataloader_num_workers", "auto", "--bf16", "auto", bf16=True) == (False, 4, False)
    assert parsed(tmp_path, "--bf16", "true", "--use_cpu", "true", **recipe)[0] is True


def test_nothing_else_is_chosen_where_nothing_is_asked_for(gpu, tmp_path):
    assert parsed(tmp_path) == (False, 0, True)
    assert parsed(tmp_path, dataloader_pin_memory=False) == (False, 0, False)


@pytest.mark.parametrize("flags", [("--bf16", "true"), ("--bf16",)])
def test_a_precision_that_is_asked_for_is_refused_by_transformers(tmp_path, flags):
    for recipe in (dict.fromkeys(CHOSEN, "auto"), {}):
        with pytest.raises(ValueError, match="Your setup doesn't support bf16/gpu"):
            parsed(tmp_path, *flags, **recipe)
    with pytest.raises(ValueError, match="Your setup doesn't support bf16/gpu"):
        parsed(tmp_path, bf16=True)


def test_auto_is_for_these_arguments_alone(task, capsys):
    line = failure(lambda: run_script("prune_vit.py", ["--seed", "auto"]), capsys)
    assert "--seed" in line
    assert "auto" in line


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/*_*.yaml")), ids=lambda path: path.stem)
def test_recipes_that_prune_run_on_any_machine(path):
    """A comparison names its precision: cells of two precisions do not belong into one table."""
    if path.parent.name in ("accelerate_configs", "comparison", "transfer"):
        return
    recipe = yaml.safe_load(path.read_text())
    assert [recipe[name] for name in CHOSEN] == ["auto"] * 3


def test_the_recipe_of_vit_base_with_own_model_and_images(task, monkeypatch, capfd):
    monkeypatch.setattr(machine, "cpu_count", lambda: 2)
    monkeypatch.chdir(task)
    steps = ("--search_max_steps", "2", "--max_steps", "2", "--prompt_size", "4")
    own = ("--model_name_or_path", "backbone", "--dataset_name", "data", "--output_dir", "out", "--references", "none")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # as torch's of workers and pinned memory
        run_command("prune_vit.py", ["--config", RECIPES / "vit/vit_base_cifar100.yaml", *own, *steps])
    recipe = yaml.safe_load((task / "out/recipe.yaml").read_text())
    assert [recipe[name] for name in CHOSEN] == [False, 1, False]
    printed = capfd.readouterr()
    assert "Chosen for this machine" in printed.out
    assert "pin_memory" not in printed.err
    assert "worker" not in printed.err
