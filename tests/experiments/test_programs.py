"""`vpns-hf prune | compare | transfer` and the scripts in `recipes/` are the same programs."""

import io
import json
import shutil
from types import SimpleNamespace

import pytest
import yaml
from datasets import DatasetDict, load_from_disk
from helpers.recipes import RECIPES, failure, run, run_command, run_script
from PIL import ImageOps

from vpns_hf.cli import main

COMMANDS = ["prune", "compare", "transfer"]
STEPS = dict(max_steps=2, search_max_steps=2, head_warm_up_epochs=0.2, eval_strategy="no", save_strategy="no")


def both(task, script, **settings):
    """The output folders of a script and of its command with the same arguments."""
    folders = []
    for name, how in (("script", run_script), ("command", run_command)):
        run(task, script=script, how=how, output_dir=f"./{name}/out", **STEPS | settings)
        folders.append(task / name / "out")
    return folders


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def timeless(path):
    return [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()]


def test_prune(task, monkeypatch):
    # No two measurements give the same milliseconds.
    monkeypatch.setattr("vpns_hf.experiments.prune.measure_milliseconds", lambda models: {})
    settings = dict(references=["omp"], eval_strategy="epoch")
    script, command = both(task, "prune_vit.py", **settings)
    assert files(script) == files(command)
    for name in ("model.safetensors", "results.md", "README.md", "sparsity_report.json", "omp/config.json"):
        assert (script / name).read_bytes() == (command / name).read_bytes(), name
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (script, command))
    assert ours["test"] == theirs["test"]
    assert [row["name"] for row in ours["test"]] == ["omp after tuning", "vpns before tuning", "vpns after tuning"]


def test_compare(task):
    script, command = both(task, "compare_methods.py", methods=["dense", "omp"], sparsities=[0.5], seeds=[1])
    assert files(script) == files(command)
    lines = timeless(script / "results.jsonl")
    assert [line["method"] for line in lines] == ["dense", "omp"]
    assert lines == timeless(command / "results.jsonl")
    assert (script / "accuracy.png").read_bytes() == (command / "accuracy.png").read_bytes()


def test_transfer(task):
    cells = dict(dataset_name="", targets=["./data"], methods=["dense", "omp"], sparsities=[0.5], seeds=[1])
    script, command = both(task, "transfer.py", **cells)
    assert files(script) == files(command)
    lines = timeless(script / "results.jsonl")
    assert [line["method"] for line in lines] == ["dense", "omp"]
    assert lines == timeless(command / "results.jsonl")


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_recipe_the_command_names_what_is_missing(command, capsys):
    line = failure(lambda: main([command]), capsys)
    assert line.startswith(f"vpns-hf {command}: `--model_name_or_path`")
    assert ("`--dataset_name`" in line) == (command != "transfer")  # where the source task is optional
    assert line.endswith(
        "must be given: as flags, or in a YAML file named by `--config`; `--help` lists all arguments."
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "seven"], "argument --seed: invalid int value: 'seven'; `--help` lists all arguments."),
        (["--sparsty", "0.5"], "unknown argument 'sparsty'; did you mean 'sparsity'?"),
        (["--config", "nowhere.yaml"], "The recipe nowhere.yaml cannot be read; pass `--config`"),
        (["--method", "vpsn"], "`method` is 'vpsn'; expected one of dense, vpns,"),
    ],
)
def test_wrong_arguments_are_one_sentence_everywhere(flags, message, capsys):
    needed = ["--model_name_or_path", "m", "--dataset_name", "d"]
    lines = [
        failure(lambda: main(["prune", *needed, *flags]), capsys),
        failure(lambda: run_script("prune_vit.py", flags), capsys),
    ]
    for line, name in zip(lines, ("vpns-hf prune", "prune_vit.py"), strict=True):
        assert line.startswith(f"{name}: ")
        assert message in line
    assert lines[0].partition(": ")[2] == lines[1].partition(": ")[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_arguments(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--model_name_or_path", "--score_learning_rate", "--dry_run"))


def test_bugs_are_not_hidden(monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("a bug")

    monkeypatch.setattr("vpns_hf.experiments.prune.parse_recipe", fail)
    with pytest.raises(KeyError, match="a bug"):
        main(["prune"])


@pytest.mark.parametrize("script", ["prune_vit.py", "compare_methods.py", "transfer.py"])
def test_scripts_hold_no_logic(script):
    code = (RECIPES / script).read_text(encoding="utf-8").split('"""')[2]
    assert len(code.strip().splitlines()) <= 12


# Terminals and recipes -----------------------------------------------------------------------------------------------


class AsciiTerminal(io.TextIOWrapper):
    """A terminal that takes ASCII alone, as with LANG=C and PYTHONIOENCODING=ascii."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="ascii")

    def shown(self):
        self.flush()
        return self.buffer.getvalue().decode("ascii")


@pytest.mark.parametrize("how", [run_script, run_command])
def test_an_ascii_terminal_loses_nothing(how, task, monkeypatch):
    """The folder is named in what is printed."""
    terminal = AsciiTerminal()
    monkeypatch.setattr("sys.stdout", terminal)
    run(task, how=how, output_dir="./caf\u00e9", references=["none"], **STEPS)
    files = {path.name for path in (task / "caf\u00e9").iterdir()}
    assert {"recipe.yaml", "README.md", "card.json", "metrics.json", "results.md", "sparsity_report.json"} <= files
    assert "caf\\xe9" in terminal.shown().replace("\n", "")


def test_files_are_written_before_anything_is_printed(task, monkeypatch):
    """Whatever the terminal does."""

    def fail(self, *arguments, **kwargs):
        raise UnicodeEncodeError("ascii", "\u00e9", 0, 1, "ordinal not in range(128)")

    monkeypatch.setattr("rich.console.Console.print", fail)
    cells = dict(sparsities=[0.5], seeds=[1], methods=["omp"])
    transfer = cells | dict(dataset_name="", targets=["./data"], methods=["dense"])
    programs = {"prune_vit.py": {"references": ["none"]}, "compare_methods.py": cells, "transfer.py": transfer}
    for script, settings in programs.items():
        with pytest.raises(SystemExit):
            run(task, script=script, output_dir=f"./{script}", **STEPS | settings)
        assert (task / script / "results.md").is_file()
    assert (task / "prune_vit.py" / "README.md").is_file()


def test_a_recipe_names_no_folder_of_the_machine(task, tmp_path_factory, monkeypatch):
    """Paths below the working directory are relative to it, others are shortened to their names; it runs again."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(task / "backbone", elsewhere / "pretrained")
    monkeypatch.chdir(task)
    run(task, model_name_or_path=str(elsewhere / "pretrained"), references=["none"], **STEPS)
    text = (task / "out" / "recipe.yaml").read_text()
    assert str(task) not in text
    assert str(elsewhere) not in text
    assert yaml.safe_load(text)["dataset_name"] == "data"
    assert yaml.safe_load(text)["model_name_or_path"] == "pretrained"
    assert "give the path again:\n# - model_name_or_path" in text
    flags = ["--model_name_or_path", elsewhere / "pretrained", "--output_dir", "again"]
    run_command("prune_vit.py", ["--config", "out/recipe.yaml", *flags])
    assert (task / "again/model.safetensors").read_bytes() == (task / "out/model.safetensors").read_bytes()


# Cells ---------------------------------------------------------------------------------------------------------------


def other_images(folder):
    """Data of as many images and classes, of other images."""
    splits = load_from_disk(folder / "data")
    turned = {name: split.map(lambda row: {"image": ImageOps.mirror(row["image"])}) for name, split in splits.items()}
    (folder / "other").mkdir()
    DatasetDict(turned).save_to_disk(folder / "other" / "data")
    return folder / "other" / "data"


def test_data_sets_of_one_name_are_not_mixed(task, capsys):
    """Neither in a comparison, nor as the target or the source of a transfer."""
    cells = dict(methods=["omp"], sparsities=[0.5], seeds=[1]) | STEPS
    other = str(other_images(task))
    run(task, script="compare_methods.py", **cells)
    message = failure(lambda: run(task, script="compare_methods.py", **cells | {"dataset_name": other}), capsys)
    assert "holds cells of other settings" in message
    shutil.copytree(task / "data", task / "target")
    moves = cells | dict(output_dir="./moved", methods=["hydra"], targets=["./target"])
    run(task, script="transfer.py", **moves)
    message = failure(lambda: run(task, script="transfer.py", **moves | {"dataset_name": other}), capsys)
    assert "holds cells of other settings" in message
    alone = cells | dict(output_dir="./alone", dataset_name="")
    run(task, script="transfer.py", targets=["./data"], **alone)
    message = failure(lambda: run(task, script="transfer.py", targets=[other], **alone), capsys)
    assert "holds cells of other settings" in message


def test_folders_of_finished_cells_are_removed(task, monkeypatch):
    """Also those that a launch left behind that was killed just after it wrote the line."""
    cells = dict(methods=["omp"], sparsities=[0.5], seeds=[1]) | STEPS

    class Killed(BaseException):
        pass

    def killed(folder, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("vpns_hf.experiments.runner.shutil", SimpleNamespace(rmtree=killed))
        with pytest.raises(Killed):
            run(task, script="compare_methods.py", **cells)
    assert list((task / "out" / "cells").iterdir())
    run(task, script="compare_methods.py", **cells)
    assert not (task / "out" / "cells").exists()
    assert len(timeless(task / "out" / "results.jsonl")) == 1


def test_lines_of_earlier_versions_are_still_reported(tmp_path):
    folder = RECIPES / "comparison" / "all_methods"
    shutil.copy(folder / "results.jsonl", tmp_path)
    config = folder.with_suffix(".yaml")
    run_script("compare_methods.py", ["--config", config, "--only_report", "true", "--output_dir", tmp_path])
    assert (tmp_path / "results.md").read_text() == (folder / "results.md").read_text()
