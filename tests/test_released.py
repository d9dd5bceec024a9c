"""Released subnetworks: they load, they do what their cards say, and `results.csv` is made from them."""

import csv
import json
from pathlib import Path

import pytest
import torch
from helpers.recipes import RECIPES, load_script

from vpns_hf import PromptedSparseModel
from vpns_hf.cli import main
from vpns_hf.report import SubnetworkCard

CARDS = Path(__file__).parents[1] / "model_cards"
DATA = {"Fashion-MNIST (10,000 images)": RECIPES / "demo/data"}
NAMES = [path.parent.name for path in sorted(CARDS.glob("*/card.json"))]


def facts(name):
    return SubnetworkCard.from_json((CARDS / name / "card.json").read_text(encoding="utf-8"))


def test_the_table_is_what_its_command_makes():
    script = load_script(CARDS / "make_results.py")
    text = (CARDS / "results.csv").read_text(encoding="utf-8")
    assert text == script.table()
    rows = {row["name"]: row for row in csv.DictReader(text.splitlines())}
    assert set(NAMES) < set(rows)
    for name in NAMES:
        assert float(rows[name]["accuracy"]) == pytest.approx(100 * facts(name).results[-1].accuracy, abs=0.005)
        assert rows[name]["file_bytes"] == str((CARDS / name / "model.safetensors").stat().st_size)
        assert rows[name]["dense_accuracy"]


def test_the_demo_is_there_at_three_sparsities():
    assert {"vpns-demo-90", "vpns-demo-95", "vpns-demo-98"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_subnetwork_loads_as_small_as_its_card_says(name):
    folder, card = CARDS / name, facts(name)
    model = PromptedSparseModel.from_pretrained(folder)
    assert model.config.state == "frozen"
    assert model.sparsity_report() == card.sparsity
    assert all(torch.all(weight[~model.masks()[key]] == 0) for key, weight in model.prunable_weights().items())
    assert (folder / "model.safetensors").stat().st_size <= 2_000_000
    assert card.repo_id == f"model_cards/{name}"
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


@pytest.mark.parametrize("name", [name for name in NAMES if facts(name).dataset in DATA])
def test_a_subnetwork_is_as_accurate_as_its_card_says(name, capsys):
    card = facts(name)
    assert main(["evaluate", str(CARDS / name), "--dataset_name", str(DATA[card.dataset]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == card.images
    # Kernels of other machines round otherwise.
    assert found["accuracy"] == pytest.approx(card.results[-1].accuracy, abs=0.002)
