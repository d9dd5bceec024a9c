"""Run recipes as the command line does."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from vpns_hf.cli import main

RECIPES = Path(__file__).parents[2] / "recipes"
PROGRAMS = {"prune_vit.py": "prune", "compare_methods.py": "compare", "transfer.py": "transfer"}


def write(folder, **content):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def load_script(path):
    """The functions of a script, which is not run."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def add_controls():
    """The controls by name, added to the table of methods for the length of a test."""
    return runpy.run_path(str(RECIPES / "comparison/controls.py"))["CONTROLS"]


def run_script(script, arguments):
    """Run a script as `python recipes/<script>` does."""
    before, sys.argv = sys.argv, [str(RECIPES / script), *map(str, arguments)]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = before


def run_command(script, arguments):
    """Run the program of a script as `vpns-hf` does."""
    assert main([PROGRAMS[script], *map(str, arguments)]) == 0


def failure(run, capsys):
    """The line on stderr with which a program ends that a user can put right."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def run(task, *flags, script="prune_vit.py", how=run_script, **settings):
    defaults = dict(
        model_name_or_path="./backbone",
        dataset_name="./data",
        output_dir="./out",
        method="vpns",
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
    config = write(task, **defaults | settings)
    how(script, ["--config", config, *flags])
