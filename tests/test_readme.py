"""The README: short, its tables are made from results, and its lines of Python run."""

import re
from pathlib import Path

import pytest
from helpers.pictures import write_images
from helpers.recipes import RECIPES, load_script
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from vpns_hf import PromptedSparseModel

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def script():
    return load_script(RECIPES / "comparison/make_readme.py")


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 150


def test_its_links_lead_to_files():
    links = re.findall(r"\]\(([^)#\s]+)", TEXT)
    local = [link for link in links if not link.startswith(("https://", "../../actions/"))]
    assert len(local) > 20
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_its_tables_are_what_the_script_makes(script):
    assert script.readme(TEXT) == TEXT
    assert len(re.findall(r"^\| (?:dense|vpns|hydra|gmp|lamp)", TEXT, re.MULTILINE)) >= 10


def test_a_table_without_its_marks_is_refused(script):
    with pytest.raises(ValueError, match="does not have the block 'demo' once"):
        script.fill("no marks", "demo", "| table |")
    marked = "a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb"
    assert script.fill(marked, "x", r"new \1") == "a\n<!-- x: begin -->\nnew \\1\n<!-- x: end -->\nb"


def test_its_picture_shows_the_methods_and_the_sizes_of_the_files(script):
    figure = script.picture(script.read_results(script.RESULTS))
    figure.canvas.draw()
    (axes,) = figure.axes
    (legend,) = figure.legends
    shown = " ".join(text.get_text() for text in legend.get_texts())
    assert all(name in shown for name in script.DRAWN)
    size = script.file_size(script.read_card("vpns-demo-95").results[-1].file_bytes)
    assert f"95%\n{size}" in [label.get_text() for label in axes.get_xticklabels()]
    assert (ROOT / "docs/assets/accuracy.png").stat().st_size > 10_000


def test_the_first_lines_classify_an_image(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(BLOCKS[0], {})
    assert "'label': 'Ankle boot'" in capsys.readouterr().out


def test_prune_share_load(hub, tmp_path, monkeypatch):
    """The lines as they stand, with a tiny backbone, few images and two steps."""
    monkeypatch.chdir(tmp_path)
    config = ViTConfig(
        image_size=64, patch_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    ViTForImageClassification(config).save_pretrained("backbone")
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained("backbone")
    write_images(tmp_path / "my_images", 30)
    block = BLOCKS[1].replace("google/vit-base-patch16-224", "./backbone")
    options = 'max_steps=2, use_cpu=True, report_to="none", per_device_train_batch_size=4'
    scope = {}
    exec(block.replace("num_train_epochs=60", options), scope)
    assert len(BLOCKS[1].strip().splitlines()) <= 15
    again, model = scope["again"], scope["model"]
    assert isinstance(again, PromptedSparseModel)
    assert again.sparsity == pytest.approx(0.9, abs=1e-3)
    assert all((mask == model.masks()[name]).all() for name, mask in again.masks().items())


def test_the_recipe_of_the_command_exists():
    (recipe,) = re.findall(r"vpns-hf prune --config recipes/(\S+)", TEXT)
    assert (RECIPES / recipe).is_file()
