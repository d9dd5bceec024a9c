"""Modules that an import loads, listed in fresh interpreters."""

import json
import subprocess
import sys

import pytest
import torch
from helpers.models import tiny_model

MODEL = "from transformers import AutoModelForImageClassification, PreTrainedModel"
TRAINER = f"{MODEL}, Trainer, TrainingArguments"
# Needed by training, evaluation and reports alone.
NOT_FOR_LOADING = ("datasets", "evaluate", "jinja2", "matplotlib", "rich", "scipy", "sklearn", "timm")


def loaded(program):
    """Names of the modules that are loaded once a program has run."""
    code = f"{program}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_the_package_loads_what_a_pretrained_model_loads_and_no_more():
    reference, ours = loaded(MODEL), loaded(f"{MODEL}\nimport vpns_hf")
    assert {name for name in ours - reference if name.partition(".")[0] not in ("vpns_hf", "torch")} == set()
    assert not {name for name in ours if name.startswith(("vpns_hf.training", "vpns_hf.data", "vpns_hf.report"))}
    assert "transformers.trainer" not in ours
    assert not {"matplotlib", "rich", "sklearn", "evaluate", "datasets", "timm"} & ours


@pytest.mark.slow
def test_the_trainer_loads_what_trainer_loads_and_no_more():
    reference, ours = loaded(TRAINER), loaded("from vpns_hf import VPNsTrainer, VPNsTrainingArguments")
    assert "transformers.trainer" in ours
    assert not {"matplotlib", "rich", "sklearn", "evaluate", "timm"} & (ours - reference)


def test_help_loads_neither_trainer_nor_data_nor_tables():
    program = """
from vpns_hf.cli import main
try:
    main(["--help"])
except SystemExit as ended:
    assert ended.code == 0
"""
    assert not {"transformers.trainer", "datasets", "matplotlib", "rich", "sklearn", "evaluate"} & loaded(program)


@pytest.mark.slow
def test_lazy_names_are_there():
    names = (
        "VPNsTrainer",
        "VPNsTrainingArguments",
        "load_transfer_dataset",
        "data",
        "experiments",
        "export",
        "methods",
    )
    program = f"import vpns_hf\nfor name in {(*names, 'report', 'scores', 'training')}: getattr(vpns_hf, name)"
    assert "vpns_hf.report.training" in loaded(program)


def test_a_subnetwork_loads_without_what_training_needs(tmp_path):
    model = tiny_model("vit")
    model.freeze_masks()
    model.save_pretrained(tmp_path / "subnetwork")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(images, tmp_path / "images.pt")
    program = f"""
import sys
sys.modules.update(dict.fromkeys({NOT_FOR_LOADING}))  # importing one of them raises ImportError
import torch, vpns_hf
from transformers import AutoModelForImageClassification
images = torch.load({str(tmp_path / "images.pt")!r})
for cls in (vpns_hf.PromptedSparseModel, AutoModelForImageClassification):
    model = cls.from_pretrained({str(tmp_path / "subnetwork")!r})
    with torch.no_grad():
        print(model(images, use_prompt=True).logits.tolist())
model.merge_and_unload().save_pretrained({str(tmp_path / "plain")!r})
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with torch.no_grad():
        expected = model(images, use_prompt=True).logits
    for line in run.stdout.splitlines():
        torch.testing.assert_close(torch.tensor(json.loads(line)), expected)
