"""Whole saved folders, mutated: each loads as what it was, or is refused in one sentence.

A file of JSON whose new values are allowed is another model by right; a packed file of weights never is.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import folder_fuzz

PROGRAM = Path(__file__).parents[1] / "helpers" / "folder_fuzz.py"


WORDS = {
    "load": {"clear sentence", "foreign sentence", "same", "different", "different with a warning"},
    "wrap": {"clear sentence", "foreign sentence", "same", "different", "different with a warning"},
    "inspect": {"clear sentence", "shown"},
}
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts memory as Linux does")


def check(counts, log):
    """No mutant ended in a traceback, took much memory or time, or changed a packed model without a word."""
    for action, words in WORDS.items():
        assert set(counts[action]) <= words, log
    checked = [line for line in log if line[1] not in ("raw", "search") and line[3] == "load"]
    assert [line for line in checked if line[4] == "different" and "safetensors, " in line[2]] == []


def test_a_few_mutated_folders_are_refused_or_the_same(tmp_path):
    counts = folder_fuzz.run(tmp_path, 0, 40, tmp_path / "log.jsonl")
    assert sum(counts["load"].values()) + sum(counts["wrap"].values()) == 40
    assert counts["load"]["clear sentence"] > counts["load"]["different"]
    check(counts, log(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 10_000, 500))
def test_mutated_folders_are_refused_or_the_same(tmp_path, first):
    command = [sys.executable, PROGRAM, tmp_path, str(first), "500"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert run.returncode == 0, run.stderr
    check(json.loads(run.stdout), log(tmp_path))


def log(folder):
    """Seed, kind, change, action, outcome and error of every mutant but the refused and the unchanged."""
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
