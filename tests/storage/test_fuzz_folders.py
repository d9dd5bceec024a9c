"""Whole saved folders, mutated: each loads as what it was, or is refused in one sentence.

A file of JSON whose new values are allowed is another model by right; a packed file of weights never is.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "helpers" / "folder_fuzz.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts memory as Linux does")
@pytest.mark.parametrize("first", range(0, 10_000, 500))
def test_mutated_folders_are_refused_or_the_same(tmp_path, first):
    command = [sys.executable, PROGRAM, tmp_path, str(first), "500"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert run.returncode == 0, run.stderr
    counts = json.loads(run.stdout)
    assert set(counts["load"]) <= {"clear sentence", "foreign sentence", "same", "different"}, log(tmp_path)
    assert set(counts["inspect"]) <= {"clear sentence", "shown"}, log(tmp_path)
    packed = [line for line in log(tmp_path) if line[1] != "raw" and line[1] != "search" and line[4] == "different"]
    assert [line for line in packed if "safetensors, " in line[2]] == []


def log(folder):
    """Seed, kind, change, action, outcome and error of every mutant but the refused and the unchanged."""
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
