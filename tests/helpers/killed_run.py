"""A training run for tests that kill it, in children of a fork server, which has imported everything already."""

import gc
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification, TrainerCallback, modeling_utils

from helpers.models import CONFIGS, tiny_model
from helpers.training import Images
from vpns_hf import VPNsTrainer, VPNsTrainingArguments
from vpns_hf.training import restoring

# The last step is no end of an epoch, and no step that is logged or saved is one that is evaluated.
SETTINGS = dict(
    method="vpns",
    per_device_train_batch_size=4,
    max_steps=7,
    score_learning_rate=1e-2,
    search_prompt_learning_rate=1e-2,
    save_strategy="steps",
    save_steps=3,
    save_total_limit=2,
    logging_steps=2,
    eval_strategy="epoch",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
)
WRITING = os.O_WRONLY | os.O_RDWR
CHANGES = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "shutil.rmtree")


class Signals(TrainerCallback):
    """Sends signals to this process in a step of a stage."""

    def __init__(self, stage, step, *signals):
        self.stage, self.step, self.signals = stage, step, signals

    def on_step_begin(self, args, state, control, **kwargs):
        if Path(args.output_dir).name.endswith(self.stage) and state.global_step == self.step - 1:
            for number in self.signals:
                os.kill(os.getpid(), number)


class FileChanges:
    """Counts everything that changes files of a folder, and kills this process in the middle of one such change.

    Args:
        folder: what is watched.
        fatal: the number of the change that kills, from 1; 0: none.
    """

    def __init__(self, folder, fatal=0):
        self.folder, self.fatal, self.count = str(folder), fatal, 0
        sys.addaudithook(self._audit)
        # These write in C++ and Rust, where Python sees nothing.
        torch.save = self._half_writing(torch.save)
        modeling_utils.safe_save_file = self._half_writing(save_file)
        restoring.save_file = self._half_writing(save_file)

    def _audit(self, event, arguments):
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING):
            return
        if event in CHANGES and self._is_ours(arguments[0]):
            self._change(lambda: None)

    def _half_writing(self, write):
        def watched(content, path, *args, **kwargs):
            write(content, path, *args, **kwargs)
            if self._is_ours(path):
                self._change(lambda: os.truncate(path, os.path.getsize(path) // 2))

        return watched

    def _is_ours(self, path):
        return not isinstance(path, int) and os.fsdecode(path).startswith(self.folder)

    def _change(self, spoil):
        self.count += 1
        if self.count == self.fatal:
            spoil()
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, log, fatal=0, signals=(), pipe=None, callbacks=(), **settings):
    """Start or go on with the run in a folder, to the end; exits as a recipe does.

    Args:
        folder: its output folder.
        log: file that takes what the run prints.
        fatal: see `FileChanges`.
        signals: arguments of `Signals`.
        callbacks: further callbacks.
        pipe: gets a message when training begins, and the number of file changes at the end.
        settings: training arguments that differ from `SETTINGS`.
    """
    # accelerate collects garbage after every stage; all that was imported need not be gone through.
    gc.freeze()
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # Whoever started the tests in the background may have had it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = CONFIGS["vit"]()
    config.hidden_dropout_prob = 0.1
    data = Images(16)
    runner = VPNsTrainer(
        model=tiny_model(AutoModelForImageClassification.from_config(config)),
        args=VPNsTrainingArguments(output_dir=str(folder), **SETTINGS | settings),
        train_dataset=data,
        prompted_train_dataset=Images(16, augment=False),
        eval_dataset=Images(8, augment=False),
        callbacks=[*callbacks, *([Signals(*signals)] if signals else [])],
    )
    changes = FileChanges(folder, fatal)
    if pipe is not None:
        pipe.send("ready")
    try:
        runner.train(resume_from_checkpoint=True)
        runner.save_model()
    except KeyboardInterrupt:
        sys.exit(130)
    if pipe is not None:
        pipe.send(changes.count)


def start(folder, **kwargs):
    """A child process that trains."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.killed_run"])
    Path(folder).mkdir(parents=True, exist_ok=True)
    process = context.Process(target=train, args=(folder, Path(folder).with_suffix(".log")), kwargs=kwargs)
    process.start()
    return process


def run(folder, **kwargs):
    """Train in a child process; returns its exit code."""
    process = start(folder, **kwargs)
    process.join()
    return process.exitcode


def outcome(folder):
    """Everything that a run leaves: weights, masks, scores, prompt, configurations and what was logged; no times."""
    weights = {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("**/model*.safetensors")}
    weights = {name: content for name, content in weights.items() if "checkpoint" not in name}
    configs = {
        str(path.relative_to(folder)): _described(json.loads(path.read_text()))
        for path in [*folder.glob("*/model/config.json"), folder / "config.json"]
    }
    logs = {
        path.parent.name: [_untimed(entry) for entry in json.loads(path.read_text())["log_history"]]
        for path in folder.glob("*/trainer_state.json")
    }
    finished = json.loads((folder / "stages.json").read_text())["finished"]
    for stage in finished:
        stage["metrics"] = _untimed(stage["metrics"])
        del stage["cost"]["seconds"]
    return {"weights": weights, "configs": configs, "logs": logs, "finished": finished}


def _described(config):
    """Less what transformers writes into a configuration when it trains or loads a model."""
    del config["backbone_config"]["dtype"]
    return {name: value for name, value in config.items() if name != "use_cache"}


def _untimed(entry):
    return {name: value for name, value in entry.items() if not name.endswith(("runtime", "per_second"))}


def assert_same_outcome(folder, whole):
    """Compare piece by piece, so that a difference is named."""
    found, expected = outcome(folder), outcome(whole)
    assert found["finished"] == expected["finished"]
    assert found["logs"] == expected["logs"]
    assert found["configs"] == expected["configs"]
    assert sorted(found["weights"]) == sorted(expected["weights"])
    assert [name for name in found["weights"] if found["weights"][name] != expected["weights"][name]] == []
    assert leftovers(folder) == []


def leftovers(folder):
    """Files and folders that were written under another name first and not moved."""
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".")]


def finished_stages(folder):
    """How many stages of a run have ended."""
    record = folder / "stages.json"
    return len(json.loads(record.read_text())["finished"]) if record.is_file() else 0
