"""`vpns-hf prune | compare | transfer` and the scripts in `recipes/` are the same programs."""

import json

import pytest
from helpers.recipes import RECIPES, failure, run, run_command, run_script

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
        (["--config", "nowhere.yaml"], "The recipe nowhere.yaml cannot be read (No such file or directory)"),
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
