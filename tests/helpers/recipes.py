"""Run recipes as the command line does."""

import runpy
import sys
from pathlib import Path

import yaml

RECIPES = Path(__file__).parents[2] / "recipes"


def write(folder, **content):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(task, *flags, script="prune_vit.py", **settings):
    script = RECIPES / script
    defaults = dict(
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
    config = write(task, **defaults | settings)
    arguments, sys.argv = sys.argv, [str(script), "--config", str(config), *flags]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = arguments
