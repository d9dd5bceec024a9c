"""Private members of transformers' Trainer: used in one module, with the signatures known when it was written."""

import ast
import inspect
from pathlib import Path

import pytest
from transformers import Trainer

import vpns_hf
from vpns_hf.training.stage_trainer import StageTrainer

PACKAGE = Path(vpns_hf.__file__).parent
OVERRIDDEN = {
    "_save_checkpoint": ["self", "model", "trial"],
    "_save": ["self", "output_dir", "state_dict"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_best_model": ["self"],
    "_determine_best_metric": ["self", "metrics", "trial"],
}
REFUSED = {"_get_train_sampler"}
# Attributes that Trainer sets while it trains.
READ = {"_globalstep_last_logged", "_total_loss_scalar", "_tr_loss"}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_signatures_are_those_of_the_installed_transformers(name):
    found = list(inspect.signature(getattr(Trainer, name)).parameters)
    assert found == OVERRIDDEN[name], f"transformers changed Trainer.{name}: adapt StageTrainer.{name}"


def test_the_attributes_are_set_by_the_installed_transformers():
    source = inspect.getsource(Trainer)
    assert [name for name in READ if f"self.{name} = " not in source] == []


def private_names(path):
    return {
        node.attr if isinstance(node, ast.Attribute) else node.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Attribute, ast.FunctionDef))
    }


def test_one_module_alone_uses_private_members():
    members = {name for name in vars(Trainer) if name.startswith("_") and not name.startswith("__")} | READ
    members |= {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(Trainer)))
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
        and isinstance(node.value, ast.Name) and node.value.id == "self" and isinstance(node.ctx, ast.Store)
    }  # fmt: skip
    used = {path.name: private_names(path) & members for path in (PACKAGE / "training").glob("*.py")}
    assert used.pop("stage_trainer.py") == set(OVERRIDDEN) | READ | REFUSED
    assert {name: found for name, found in used.items() if found} == {}


def test_every_recorded_member_is_overridden():
    assert {name for name in vars(StageTrainer) if name in OVERRIDDEN} == set(OVERRIDDEN)
