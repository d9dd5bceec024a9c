"""Kill runs of six kinds at random moments, and compare their ends with those of runs that nobody killed.

    python tests/helpers/kill_runs.py --kills 100 --signals 20

SIGKILL goes to the process; SIGTERM and SIGINT go to its whole group, data-loader workers included. Every killed run
is started again until it ends; then all that it leaves must be that of the uninterrupted run, bit for bit, without
anything beside it. Prints one line a kind; the exit code is 1 where something differs.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from transformers import TrainerCallback, ViTImageProcessor

from helpers import killed_run
from helpers.models import tiny_backbone
from vpns_hf.experiments import compare, transfer
from vpns_hf.training.checkpoints import damage

TRAINED = {"vpns": {}, "gmp": {}, "imp": {"sparsity": 0.5, "max_steps": 4}, "vpns_joint": {}}
PROGRAMS = {"compare": compare.main, "transfer": transfer.main}
KINDS = (*TRAINED, *PROGRAMS)
CELLS = dict(
    model_name_or_path="./backbone",
    dataset_name="./data",
    prompt_size=4,
    methods=["vpns", "omp"],
    sparsities=[0.5],
    seeds=[1],
    max_steps=6,
    save_strategy="steps",
    save_steps=2,
    head_warm_up_epochs=0.2,
    eval_strategy="no",
    per_device_train_batch_size=8,
    disable_tqdm=True,
    dataloader_pin_memory=False,
    report_to="none",
    use_cpu=True,
)


class Ready(TrainerCallback):
    """Sends a message when the first step begins."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_step_begin(self, args, state, control, **kwargs):
        if self.pipe is not None:
            self.pipe.send("ready")
            self.pipe = None


def work(kind, folder, pipe, workers):
    """Run or resume one run to its end, in a process and a process group of its own."""
    os.setsid()
    # As in a process that nobody started from another one: data-loader workers are forks of it.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    if kind in TRAINED:
        settings = TRAINED[kind] | {"method": kind, "dataloader_num_workers": workers}
        code = 0
        try:
            killed_run.train(folder, folder.with_suffix(".log"), callbacks=[Ready(pipe)], **settings)
        except SystemExit as stopped:
            code = stopped.code
        # Outside of the handler, as at the end of a program: the exception, and the loader in its frames, are gone.
        sys.exit(code)
    with open(folder.with_suffix(".log"), "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    pipe.send("ready")
    PROGRAMS[kind](["--config", str(folder.parent / f"{kind}.yaml"), "--output_dir", str(folder)])


def start(kind, folder, workers=0):
    """Start a run; returns its process once it works."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.kill_runs"])
    receiving, sending = multiprocessing.Pipe(duplex=False)
    folder.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=work, args=(kind, folder, sending, workers))
    process.start()
    while process.is_alive() and not receiving.poll(0.01):
        pass
    return process


def finish(kind, folder):
    """Run to the end."""
    process = start(kind, folder)
    process.join()
    assert process.exitcode == 0, folder.with_suffix(".log").read_text()[-2000:]


def leavings(folder):
    """Names of all files, contents of the weights, and the lines of results without their times."""
    paths = [path for path in folder.rglob("*") if not path.name.endswith(".lock")]
    lines = [json.loads(line) | {"seconds": 0} for line in (folder / "results.jsonl").read_text().splitlines()]
    return (
        sorted(str(path.relative_to(folder)) for path in paths),
        {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.suffix == ".safetensors"},
        sorted(lines, key=str),
    )


def check(kind, folder, whole):
    """Raise where a run left something else than the uninterrupted one."""
    if kind in TRAINED:
        killed_run.assert_same_outcome(folder, whole)
        return
    for found, expected in zip(leavings(folder), leavings(whole), strict=True):
        assert found == expected, (found, expected)


@dataclass
class Uninterrupted:
    """A run that nobody killed, and the seconds from its first step to its end."""

    folder: Path
    seconds: float

    @classmethod
    def make(cls, kind, folder, workers=0):
        """Train it."""
        process = start(kind, folder, workers)
        started = time.perf_counter()
        process.join()
        assert process.exitcode == 0, folder.with_suffix(".log").read_text()[-2000:]
        return cls(folder, time.perf_counter() - started)


def prepare(folder):
    """Write backbone, data and recipes."""
    tiny_backbone("vit").save_pretrained(folder / "backbone")
    size = {"height": 32, "width": 32}
    ViTImageProcessor(size=size, image_mean=[0.4] * 3, image_std=[0.3] * 3).save_pretrained(folder / "backbone")
    rng = np.random.default_rng(0)

    def rows(count, classes):
        for index in range(count):
            pixels = rng.integers(0, 80, (32, 32)) + 80 * (index % classes)
            yield {"image": PILImage.fromarray(pixels.astype(np.uint8)), "label": index % classes}

    for name, classes in (("data", 3), ("target", 2)):
        features = Features({"image": Image(), "label": ClassLabel(num_classes=classes)})
        counts = {"train": 36, "test": 12}
        splits = {split: Dataset.from_list(list(rows(n, classes)), features=features) for split, n in counts.items()}
        DatasetDict(splits).save_to_disk(folder / name)
    for kind, further in (("compare", {}), ("transfer", {"targets": ["./target"]})):
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(CELLS | further))


def kill(process, seconds, number=signal.SIGKILL, whole_group=False):
    """Send a signal after some seconds; returns whether the run was still there."""
    process.join(seconds)
    if not process.is_alive():
        return False
    if whole_group:
        # A group of its own, or else this one would be hit.
        assert os.getpgid(process.pid) == process.pid
        os.killpg(process.pid, number)
    else:
        process.kill()
    process.join()
    return process.exitcode != 0


def kill_run(kind, folder, whole, draws):
    """Kill a run three times at random moments and let it end; returns how often it was killed."""
    kills = 0
    for _ in range(3):
        kills += kill(start(kind, folder), draws.uniform(0, whole.seconds))
    finish(kind, folder)
    check(kind, folder, whole.folder)
    return kills


def signal_run(kind, folder, whole, draws):
    """Send SIGTERM or SIGINT to the group of a run with workers and let it end; returns whether it was there."""
    number = draws.choice([signal.SIGTERM, signal.SIGINT])
    process = start(kind, folder, workers=2)
    was_there = kill(process, draws.uniform(0, 0.9 * whole.seconds), number, whole_group=True)
    log = folder.with_suffix(".log").read_text()
    assert "Traceback" not in log, log[-3000:]
    assert process.exitcode in (0, 128 + number, -number), process.exitcode
    kept = [path for path in folder.glob("*/checkpoint-*") if damage(path) is None]
    assert kept or killed_run.finished_stages(folder), "no checkpoint was kept"
    finish(kind, folder)
    check(kind, folder, whole.folder)
    return int(was_there)


def repeat(name, wanted, kinds, attempt: Callable[..., int], folder, workers, draws):
    """Go through the kinds until there were as many kills as wanted; returns kills and failures by kind."""
    kills, failures, wholes = Counter(), Counter(), {}
    for number in range(10 * wanted):
        kind = kinds[number % len(kinds)]
        if kind not in wholes:
            wholes[kind] = Uninterrupted.make(kind, folder / f"{name}-{kind}", workers)
        try:
            kills[kind] += attempt(kind, folder / f"{name}-{number}", wholes[kind], draws)
        except AssertionError as error:
            failures[kind] += 1
            print(f"{name} {number}, {kind}: {error}", flush=True)
        print(f"{name}: {kills.total()} of {wanted}, {failures.total()} failures", flush=True)
        if kills.total() >= wanted:
            break
    return kills, failures


def main(arguments=None):
    """Kill runs as the command line says; returns the number of failures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs over the six kinds of run")
    parser.add_argument("--signals", type=int, default=20, help="SIGTERMs and SIGINTs to process groups with workers")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    wanted = parser.parse_args(arguments)
    draws = random.Random(wanted.seed)
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        parts = {
            "SIGKILL": repeat("kill", wanted.kills, KINDS, kill_run, Path(name), 0, draws),
            "SIGTERM, SIGINT": repeat("signal", wanted.signals, tuple(TRAINED), signal_run, Path(name), 2, draws),
        }
    for part, (kills, failures) in parts.items():
        for kind in kills:
            print(f"{part:16} {kind:12} {kills[kind]:4} times, {failures[kind]} runs ended otherwise")
    return sum(failures.total() for _, failures in parts.values())


if __name__ == "__main__":
    sys.exit(min(main(), 1))
