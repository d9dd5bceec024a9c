"""The documentation: every page is in the menu, names what exists, and its examples run. CI builds the site."""

import ast
import dataclasses
import importlib
import re
from pathlib import Path

import pytest
import yaml
from helpers.models import tiny_backbone
from helpers.recipes import load_script

from vpns_hf import PromptedSparseModel, VPNsTrainingArguments
from vpns_hf.data import TRANSFER_TASKS
from vpns_hf.experiments import DataArguments, ModelArguments
from vpns_hf.experiments.arguments import PruneArguments
from vpns_hf.experiments.compare import ComparisonArguments
from vpns_hf.masking import select_masks
from vpns_hf.methods import METHODS, get_method
from vpns_hf.model import PROMPTS
from vpns_hf.scores import SCORES, score_weights

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
# Flags of accelerate, of `vpns-hf export`, of `vpns-hf benchmark` and of benchmarks.
OTHER_FLAGS = {
    *("num_cpu_threads_per_process", "config_file", "num_processes", "machine_rank", "config", "help"),
    *("format", "with_prompt", "without_prompt", "models", "threads", "save"),
}


HOOKS = load_script(DOCS / "hooks.py")


def read(page):
    return (DOCS / page).read_text(encoding="utf-8")


def menu():
    """The pages of the menu, in order."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").replace("!ENV ", "")
    entries, pages = list(yaml.safe_load(text)["nav"]), []
    while entries:
        (value,) = entries.pop(0).values()
        if isinstance(value, list):
            entries = value + entries
        else:
            pages.append(value)
    return pages


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)


def test_the_menu_holds_every_page_once():
    assert sorted(menu()) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_a_page_can_be_filled_in_and_names_files_that_exist(page):
    """Macros, included sections and links into the repository; `mkdocs --strict` checks links between pages."""
    for repo_url in ("", "https://example.org/me/repo"):
        filled = HOOKS.fill(read(page), page, repo_url)
        assert "{{ " not in filled
        assert "](repo:" not in filled
    named = set(re.findall(r"\b(?:vpns_hf|recipes|tests|benchmarks)/[\w./-]+\.(?:py|md|yaml)\b", read(page)))
    assert sorted(name for name in named if not (ROOT / name).is_file()) == []
    for place in re.findall(r"^::: (\S+)$", read(page), re.MULTILINE):
        module, _, name = place.rpartition(".")
        assert hasattr(importlib.import_module(module), name)


def test_the_table_of_methods_is_that_of_the_package():
    rows = HOOKS.methods_table().splitlines()[2:]
    assert [row.split("|")[1].strip(" `") for row in rows] == list(METHODS)
    # A bar in a description would end its cell.
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}
    row = next(row for row in rows if row.startswith("| `imp` |"))
    assert "| warm-up, round (several), tune |" in row
    assert (
        "arXiv [1803.03635](https://arxiv.org/abs/1803.03635), [2012.06908](https://arxiv.org/abs/2012.06908)" in row
    )


def test_the_tables_of_arguments_are_those_of_the_classes():
    rows = HOOKS.arguments_table("DataArguments").splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [entry.name for entry in dataclasses.fields(DataArguments)]
    assert rows[0].startswith("| `dataset_name` | required | A transfer task")
    own = HOOKS.arguments_table("VPNsTrainingArguments")
    assert "| `sparsity` | `None` | Fraction of prunable weights to remove" in own
    assert "`ddp_backend`" not in own


def test_links_of_included_files_lead_where_they_led(monkeypatch, tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/page.md").write_text(
        "# Title\n\n[up](../other.md#part) [![x](x.png)](x.png) [web](https://a.b) [here](#below)\n\n## Below\n\n"
        "```python\nlayer[0](pixels)\n```\n\n## Rest\n\nend\n"
    )
    for name in ("a/other.md", "a/b/x.png"):
        (tmp_path / name).touch()
    monkeypatch.setattr(HOOKS, "ROOT", tmp_path)
    text = HOOKS.fill("# Own\n\n{{ include a/b/page.md }}", "guides/own.md", "https://g.h/me/repo")
    picture = "../pictures/a/b/x.png"
    assert "Title" not in text
    assert "[up](https://g.h/me/repo/blob/main/a/other.md)" in text
    assert f"[![x]({picture})]({picture})" in text
    assert "[web](https://a.b) [here](#below)" in text
    assert "layer[0](pixels)" in text
    assert HOOKS.fill("{{ include a/b/page.md#Rest }}", "own.md", "") == "end"
    (tmp_path / "docs/guides").mkdir(parents=True)
    (tmp_path / "docs/guides/some.md").touch()
    (tmp_path / "README.md").write_text("# Title\n\n[some](docs/guides/some.md)\n")
    assert "[some](some.md)" in HOOKS.fill("{{ include README.md }}", "guides/own.md", "")
    assert "[some](guides/some.md)" in HOOKS.fill("{{ include README.md }}", "own.md", "https://g.h/me/repo")
    assert HOOKS.fill("[other](repo:a/other.md)", "own.md", "") == "other (`a/other.md`)"
    for wrong in ("[other](repo:a/none.md)", "{{ include a/b/page.md#None }}", "{{ include a/none.md }}"):
        with pytest.raises(FileNotFoundError):
            HOOKS.fill(wrong, "own.md", "")


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_flags_that_exist(page):
    groups = (ModelArguments, DataArguments, VPNsTrainingArguments, PruneArguments, ComparisonArguments)
    known = {entry.name for group in groups for entry in dataclasses.fields(group)} | OTHER_FLAGS
    flags = re.findall(r"--([a-z]\w+)", read(page))
    assert sorted(flag for flag in flags if flag not in known) == []


@pytest.mark.parametrize("page", PAGES)
def test_examples_are_valid_python(page):
    for block in blocks(page, "python"):
        ast.parse(block)
        for module, names in re.findall(r"^from (vpns_hf[\w.]*) import (.+)$", block, re.MULTILINE):
            assert all(hasattr(importlib.import_module(module), name.strip()) for name in names.split(","))


@pytest.fixture
def extensions():
    """The examples of the page, run in order, as long as a test lasts."""
    tables = (SCORES, PROMPTS, TRANSFER_TASKS)
    before = [dict(table) for table in tables]
    for block in blocks("extend.md", "python"):
        exec(block, {})
    yield [set(table) - set(old) for table, old in zip(tables, before, strict=True)]
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


def test_extensions_work(extensions):
    assert extensions == [{"distance_to_mean"}, {"tint"}, {"my_pets"}]
    assert get_method("distance+prompt").uses_prompt
    assert [stage.length for stage in METHODS["hydra_slow"].stages] == ["warm_up", "tune", "tune"]
    model = PromptedSparseModel.from_backbone(
        tiny_backbone("vit"), prompt="tint", image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    assert model.prompt.delta().shape == (3, 32, 32)
    masks = select_masks(score_weights("distance_to_mean", model, []), 0.9)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.1 * total)
