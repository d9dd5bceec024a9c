"""Mutate whole saved folders and see what becomes of each: `python folder_fuzz.py SCRATCH FIRST COUNT`.

A program of its own, so that a mutant that takes memory or time takes that of its process alone.
"""

import contextlib
import io
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers import ViTImageProcessor

import vpns_hf
from helpers.models import tiny_backbone, tiny_model
from helpers.mutations import mutate_bytes, mutate_json
from vpns_hf import PromptedSparseModel
from vpns_hf.cli import main

PACKAGE = str(Path(vpns_hf.__file__).parent)
# Seconds of the processor, and seconds by the clock, which other programs share.
SECONDS, HANGING, MEMORY, ADDRESSES = 20, 1200, 2**28, 2**34
RECIPE = "# packages:\n#   torch: 2.9.0\nmethod: vpns\nseed: 7\ndataset_name: me/days\nmodel_name_or_path: me/vit\n"
CARD = "---\nlibrary_name: vpns_hf\nlicense: mit\nbase_model: me/vit\ndatasets:\n- me/days\n---\n# Days\n"
SEEDS: dict[str, tuple[str, dict, dict]] = {
    "packed": ("vit", {}, {}),
    "shards": ("vit", {}, {"max_shard_size": "10KB"}),
    "raw": ("vit", {}, {"packed": False}),
    "mapped": ("vit", {"label_mapping": "frequency", "num_labels": 3, "prompt": "expand"}, {}),
    "timm": ("timm_resnet", {"label_mapping": "bayesian", "num_labels": 3, "prompt": "lowrank"}, {}),
    "search": ("vit", {"prompt": None}, {}),
}
# Folders of backbones, as transformers saves them.
BACKBONES = {"plain": "vit", "plain timm": "timm_resnet", "plain cnn": "resnet"}


WARNED: list[str] = []


class Listen(logging.Handler):
    """Collect the warnings of the package."""

    def emit(self, record: logging.LogRecord) -> None:
        WARNED.append(record.getMessage())


class TooLong(BaseException):
    """A mutant took more than its seconds."""


def seed_folders(root: Path) -> dict[str, tuple[Path, list[torch.Tensor]]]:
    """A saved folder of each kind, and what its model makes of two images."""
    folders = {}
    for name, family in BACKBONES.items():
        torch.manual_seed(0)
        folder = root / name
        tiny_backbone(family).save_pretrained(folder)
        add_processor(folder)
        folders[name] = folder, outputs(wrapped(folder))
    for name, (family, building, saving) in SEEDS.items():
        torch.manual_seed(0)
        model = tiny_model(family, **building)
        if model.config.label_mapping:
            bayesian = model.config.label_mapping == "bayesian"
            model.set_label_mapping(torch.rand(6, 3) if bayesian else [4, 0, 2])
        if name != "search":
            model.freeze_masks()
        if model.prompt is not None:
            with torch.no_grad():
                for parameter in model.prompt.parameters():
                    parameter.normal_()
        folder = root / name
        model.save_pretrained(folder, **saving)
        add_processor(folder)
        (folder / "README.md").write_text(CARD)
        (folder / "recipe.yaml").write_text(RECIPE)
        folders[name] = folder, outputs(PromptedSparseModel.from_pretrained(folder))
    return folders


def add_processor(folder: Path) -> None:
    size = {"height": 32, "width": 32}
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)


def wrapped(folder: Path) -> PromptedSparseModel:
    """A model on the backbone in a folder."""
    return PromptedSparseModel.from_backbone(str(folder), sparsity=0.5, scope="layer", prompt_size=4)


@torch.no_grad()
def outputs(model: PromptedSparseModel) -> list[torch.Tensor]:
    """Fingerprint of a model: logits with and without the prompt, masks and pixels."""
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    found = [model.eval()(images).logits, *model.masks().values()]
    if model.prompt is not None:
        found.append(model(images, use_prompt=True).logits)
    if model.image_processor is not None:
        picture = torch.arange(3 * 40 * 50).view(3, 40, 50).to(torch.uint8)
        found.append(model.image_processor(picture, return_tensors="pt")["pixel_values"])
    return found


def mutate(folder: Path, rng: random.Random) -> str:
    """Change one or two files of the folder and return the names of the first."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for index in range(rng.choice([1, 1, 1, 2])):
        weights = [1 if path.suffix == ".json" else 1 / len(files) for path in files]
        path = rng.choices(files, weights if rng.random() < 0.6 else None)[0]
        change = mutate_json if path.suffix == ".json" and rng.random() < 0.75 else mutate_bytes
        if index == 0:
            first = f"{path.name}, {change.__name__}"
        with contextlib.suppress(ValueError):
            path.write_bytes(change(path.read_bytes(), rng))
    return first


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Whether two models gave the same."""
    return len(found) == len(expected) and all(
        torch.equal(one, other) for one, other in zip(found, expected, strict=True)
    )


def load(folder: Path, expected: list[torch.Tensor]) -> str:
    """Load and run a mutant: `same` or `different` from what was saved."""
    return "same" if same(outputs(PromptedSparseModel.from_pretrained(folder)), expected) else "different"


def wrap(folder: Path, expected: list[torch.Tensor]) -> str:
    """The same for a mutant of a backbone."""
    return "same" if same(outputs(wrapped(folder)), expected) else "different"


def inspect(folder: Path, expected: object) -> str:
    """Show a mutant as `vpns-hf inspect` does: `shown`, or `steered` where control characters came through."""
    shown, errors = io.StringIO(), io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(errors):
        try:
            code = main(["inspect", str(folder)])
        except SystemExit as ended:
            code = ended.code
    text = shown.getvalue() + errors.getvalue()
    if not all(character.isprintable() or character == "\n" for character in text):
        return "steered"
    if not code:
        return "shown"
    return "clear sentence" if code == 2 and len(errors.getvalue().splitlines()) == 1 else "traceback"


def outcome(
    action: Callable[[Path, list[torch.Tensor]], str], folder: Path, expected: list[torch.Tensor]
) -> tuple[str, str]:
    """The word for what became of a mutant, see [`run`], and its error."""
    message = ""
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    WARNED.clear()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, HANGING)
    try:
        word = action(folder, expected)
    except TooLong:
        word = "too long"
    except (ValueError, OSError) as error:
        message = f"{type(error).__name__}: {error}"
        # Those who look after a message raise it in the package, or pass on what another library says.
        ours = traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE)
        word = "clear sentence" if ours and "\n" not in str(error) else "foreign sentence"
    except BaseException as error:  # whatever it is, it is counted
        word, message = "traceback", traceback.format_exc()[-600:] + type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    if word == "different" and WARNED:
        word, message = "different with a warning", WARNED[0]
    return f"{word}, memory" if status("VmHWM") - before > MEMORY else word, message


def status(field: str) -> int:
    """Bytes of this process, as Linux counts them."""
    return int(re.findall(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024


def run(root: Path, first: int, count: int, log: Path | None = None) -> dict[str, Counter]:
    """Count the outcomes of mutants `first` to `first + count - 1`, by what was done with them.

    `clear sentence` (raised by the package, one line), `foreign sentence` (a ValueError or OSError of another
    library), `traceback` (any other exception), `same`, `different`, `too long`, and `memory` behind any of them.
    """
    signal.signal(signal.SIGALRM, raise_too_long)
    signal.signal(signal.SIGPROF, raise_too_long)
    logging.getLogger("vpns_hf").addHandler(Listen(logging.WARNING))
    folders = seed_folders(root / "seeds")
    counts: dict[str, Counter] = {action.__name__: Counter() for action in (load, inspect, wrap)}
    for seed in range(first, first + count):
        rng = random.Random(seed)
        name = rng.choice(list(folders))
        source, expected = folders[name]
        mutant = root / "mutant"
        shutil.rmtree(mutant, ignore_errors=True)
        shutil.copytree(source, mutant)
        change = mutate(mutant, rng)
        for action in (wrap,) if name in BACKBONES else (load, inspect):
            word, message = outcome(action, mutant, expected)
            counts[action.__name__][word] += 1
            if log is not None and word not in ("clear sentence", "same", "shown"):
                with log.open("a") as file:
                    file.write(json.dumps([seed, name, change, action.__name__, word, message]) + "\n")
        if log is not None and (seed + 1) % 100 == 0:
            log.with_name("counts.json").write_text(json.dumps([seed + 1, counts], indent=2))
    return counts


def raise_too_long(*_: object) -> None:
    """Handle SIGALRM and SIGPROF."""
    raise TooLong


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    sys.stdin = open(os.devnull)  # noqa: SIM115
    scratch = Path(sys.argv[1])
    found = run(scratch, int(sys.argv[2]), int(sys.argv[3]), scratch / "log.jsonl")
    print(json.dumps(found, indent=2))
