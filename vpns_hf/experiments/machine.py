"""Choose precision, data-loading workers and pinned memory for the machine, where they are `auto`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from joblib import cpu_count
from transformers.utils import is_torch_bf16_gpu_available

AUTO = "auto"
NAMES = ("bf16", "dataloader_num_workers", "dataloader_pin_memory")
"""Arguments that may be `auto`."""
MAX_WORKERS = 4


def split_auto(flags: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Split the command line into the flags of other values and the arguments that are `auto`.

    Args:
        flags: the command line.
    """
    rest, found = list(flags), dict[str, str]()
    for name in NAMES:
        position = rest.index(f"--{name}") if f"--{name}" in rest else len(rest)
        if rest[position + 1 : position + 2] == [AUTO]:
            del rest[position : position + 2]
            found[name] = AUTO
    return rest, found


def choose(given: Mapping[str, Any]) -> dict[str, Any]:
    """Choose values for the arguments that are `auto`, and for pinned memory that is not given either.

    `bf16` where a GPU computes in it, pinned memory where there is a GPU to copy to, and one worker for every two CPU
    cores of a process, at most `MAX_WORKERS`.

    Args:
        given: arguments of the recipe and the command line by name.
    """
    on_cpu = _is_asked(given, "use_cpu") or parse_flag_from_env("ACCELERATE_USE_CPU")
    values = {
        "bf16": not on_cpu and not _is_asked(given, "fp16") and is_torch_bf16_gpu_available(),
        "dataloader_num_workers": min(MAX_WORKERS, _cores() // 2),
        "dataloader_pin_memory": not on_cpu and torch.accelerator.is_available(),
    }
    asked = {"dataloader_pin_memory": AUTO} | dict(given)
    return {name: value for name, value in values.items() if asked.get(name) == AUTO}


def _is_asked(given: Mapping[str, Any], name: str) -> bool:
    # Other values are refused with those of all arguments, by the parser.
    return str(given.get(name)).lower() in ("true", "t", "yes", "y", "1")


def describe(chosen: Mapping[str, Any]) -> str:
    """Describe the chosen values, as flags, in one line."""
    device = "a GPU" if torch.accelerator.is_available() else "no GPU"
    flags = " ".join(f"--{name} {str(value).lower()}" for name, value in chosen.items())
    return f"Chosen for this machine ({device}, CPU cores for each process: {_cores()}): {flags}"


def _cores() -> int:
    """Return the CPU cores that this process can use, shared with those beside it."""
    return max(1, cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
