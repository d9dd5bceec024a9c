"""The model card: what it says, its metadata, and renewing it."""

import re
from pathlib import Path

import pytest
from helpers.models import tiny_model
from huggingface_hub import ModelCard

from vpns_hf.hub import BEGIN, END
from vpns_hf.latency import Latency, LatencyReport, Machine
from vpns_hf.report import Result, SubnetworkCard
from vpns_hf.report.latency_saving import dense_accuracy, save_latency
from vpns_hf.training.plan import StageSettings

CARDS = Path(__file__).parents[2] / "model_cards"
RESULTS = [
    Result("dense fine-tuned", 0.0, 0.84, None, 300, 4000),
    Result("vpns after tuning", 0.5, 0.8225, 0.83, 300, 2100),
]


def card(**changes):
    model = tiny_model("vit")
    facts = dict(
        title="tiny-vpns-50",
        repo_id="me/tiny-vpns-50",
        base_model="google/vit-base-patch16-224",
        base_model_is_on_hub=True,
        dataset="cifar100",
        dataset_id="uoft-cs/cifar100",
        split="test",
        images=10000,
        method="Learn masks and a visual prompt together.",
        results=RESULTS,
        sparsity=model.sparsity_report(),
        stages=[
            StageSettings("warm_up", 20, {"head": ("sgd", 0.01)}),
            StageSettings("search", 150, {"scores": ("adam", 1e-4), "prompt": ("adam", 1e-4)}),
        ],
        settings={"seed": "7", "batch size": "64"},
        has_prompt=True,
        figures={"The learned prompt": "figures/prompt.png"},
        license="apache-2.0",
    )
    return SubnetworkCard(**facts | changes)


WHOLE = r"""
# tiny-vpns-50

<!-- vpns_hf: begin -->
google/vit-base-patch16-224 for cifar100, with 50\.00% of its prunable weights: [\d,]+ of [\d,]+
are kept, all others are exactly zero \(\d\d\.\d\d% of all [\d,]+ parameters are\)\. Learn masks and a .*

Made with \[vpns_hf\]\(https://arxiv\.org/abs/2312\.01397\) \d+\.\d+\.\d+\.

## Use

```python
import vpns_hf
from transformers import pipeline

classify = pipeline\("image-classification", model="me/tiny-vpns-50"\)
```

```python
from vpns_hf import PromptedSparseModel

model = PromptedSparseModel\.from_pretrained\("me/tiny-vpns-50"\)
print\(model\.sparsity\)
plain = model\.merge_and_unload\(\)  # the stock backbone with the zeros written in
```

The model has a visual prompt, a pattern added to the pixels\. It is not added by default;
`model\(pixel_values, use_prompt=True\)` adds it\.

## Results

Measured on the 10,000 images of the test split of cifar100, with the last weights\.

\| model \|.*
\|---\|.*
\| dense fine-tuned \| 0\.00% \| 84\.00% \| . \| 100\.00% \| 300 \| 4\.0 kB \|
\| vpns after tuning \| 50\.00% \| 82\.25% \| 83\.00% \| 97\.92% \| 300 \| 2\.1 kB \|

## What is kept

\| block \| kept \| weights \| sparsity \|
\|---\|---:\|---:\|---:\|
(\| [\w. ]+ \| [\d,]+ \| [\d,]+ \| 50\.00% \|
)+
## Training

\| stage \| what trained \| optimizer steps \|
\|---\|---\|---:\|
\| warm up \| head: sgd at 0\.01 \| 20 \|
\| search \| prompt: adam at 0\.0001, scores: adam at 0\.0001 \| 150 \|

- seed: 7
- batch size: 64

## Figures

!\[The learned prompt\]\(figures/prompt\.png\)

## Limits

Unstructured zeros make the file small; they do not make dense kernels faster(.|\n)*
## Citation

```bibtex
(.|\n)*
```
<!-- vpns_hf: end -->
"""


def test_the_whole_card():
    text = card().render().text
    assert re.fullmatch(WHOLE.strip(), text.strip()), text
    assert not re.search(r"more information|todo|\[\]|None|\{\{", text, re.IGNORECASE)


def test_metadata():
    data = card().render().data.to_dict()
    assert data["library_name"] == "vpns_hf"
    assert data["pipeline_tag"] == "image-classification"
    assert data["base_model"] == "google/vit-base-patch16-224"
    assert data["datasets"] == ["uoft-cs/cifar100"]
    assert data["license"] == "apache-2.0"
    (entry,) = data["model-index"]
    (result,) = entry["results"]
    assert result["metrics"][0]["value"] == 0.8225
    assert result["dataset"]["type"] == "uoft-cs/cifar100"
    prompted = card(uses_prompt=True).render().data.to_dict()
    assert prompted["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.83


def test_nothing_is_said_that_is_not_known():
    plain = card(
        license=None, dataset_id=None, base_model_is_on_hub=False, figures={}, settings={}, has_prompt=False
    ).render()
    data = plain.data.to_dict()
    assert not {"license", "datasets", "base_model"} & set(data)
    assert "Figures" not in plain.text
    assert "prompt," not in plain.text
    assert "- seed" not in plain.text


def test_use_as_shown(tmp_path):
    """The code on the card runs."""
    model = tiny_model("vit")
    model.freeze_masks()
    model.save_pretrained(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", card(repo_id=str(tmp_path)).render().text, re.DOTALL)
    assert len(blocks) == 2
    scope = {}
    exec(blocks[1], scope)
    assert scope["plain"].config.model_type == "vit"


def test_renewing_keeps_what_people_wrote(tmp_path):
    path = tmp_path / "README.md"
    card().save(path)
    edited = path.read_text().replace("# tiny-vpns-50\n", "# My model\n\nMy words.\n") + "\nMore of my words.\n"
    edited = edited.replace("license: apache-2.0", "license: mit\nlanguage: en")
    path.write_text(edited)
    card(results=[RESULTS[0], Result("vpns after tuning", 0.5, 0.9, None, 1, 1)], license=None).save(path)
    renewed = ModelCard.load(path)
    assert "# My model\n\nMy words." in renewed.text
    assert "More of my words." in renewed.text
    assert "90.00%" in renewed.text
    assert "82.25%" not in renewed.text
    assert renewed.data.to_dict()["license"] == "mit"
    assert renewed.data.to_dict()["language"] == "en"
    before = path.read_text()
    card(results=[RESULTS[0], Result("vpns after tuning", 0.5, 0.9, None, 1, 1)], license=None).save(path)
    assert path.read_text() == before


def test_a_foreign_card_keeps_its_text(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\ntags:\n- mine\n---\n# Theirs\n\nText.\n")
    card().save(path)
    merged = ModelCard.load(path)
    assert merged.text.index("# Theirs") < merged.text.index(BEGIN) < merged.text.index(END)
    assert merged.data.tags[:2] == ["mine", "vpns_hf"]


def test_the_facts_of_a_card_survive_json():
    facts = card()
    again = SubnetworkCard.from_json(facts.to_json())
    assert again == facts
    assert str(again.render()) == str(facts.render())


def test_latency_that_is_added_to_a_card_is_part_of_its_facts(tmp_path):
    machine = Machine("Abacus 3", 2, None, {})
    rows = [Latency(name, 1, 1, (ms / 1000,) * 3, 10, None) for name, ms in (("torch", 4.0), ("sparse", 5.0))]
    report, facts = LatencyReport(machine, 0.9, (32, 32), tuple(rows)), card()
    facts.save(tmp_path / "README.md")
    (tmp_path / "card.json").write_text(facts.to_json())
    save_latency(report, tmp_path)
    added = (tmp_path / "README.md").read_text()
    assert added.index("## Figures") < added.index("## Latency") < added.index("## Limits")
    assert "NOT faster than the dense one in torch with batch 1 and 1 thread (0.80 times as fast" in added
    again = SubnetworkCard.from_json((tmp_path / "card.json").read_text())
    assert again.latency == report
    assert str(again.render()).split() == added.split()
    assert dense_accuracy(tmp_path) == 0.84
    (tmp_path / "card.json").write_text("{}")
    with pytest.raises(ValueError, match="does not hold the facts of a model card"):
        save_latency(report, tmp_path)


@pytest.mark.parametrize("name", [path.parent.name for path in sorted(CARDS.glob("*/card.json"))])
def test_released_cards_are_what_the_template_makes_of_their_facts(name):
    folder = CARDS / name
    facts = SubnetworkCard.from_json((folder / "card.json").read_text(encoding="utf-8"))
    assert (folder / "README.md").read_text(encoding="utf-8") == str(facts.render())
    assert facts.figures
    assert all((folder / figure).is_file() for figure in facts.figures.values())
