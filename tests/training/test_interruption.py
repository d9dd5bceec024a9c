"""A run that is killed or stopped at any moment and resumed ends as if it had not been, bit for bit."""

import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.killed_run import assert_same_outcome, finished_stages, outcome, run, start
from helpers.training import Images, fresh, make_trainer

from vpns_hf.training.checkpoints import damage, last_complete_checkpoint
from vpns_hf.training.interruption import StopSignals

TESTS = Path(__file__).parents[1]
BEST = dict(
    eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, metric_for_best_model="loss", save_total_limit=1
)


@pytest.fixture(scope="module", autouse=True)
def _fork_server_finds_the_tests():
    # The fork server imports the tests' own modules before it knows the path of this process.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def uninterrupted(folder, **settings):
    """A whole run, how often it changed files, and the seconds that it took."""
    receiving, sending = multiprocessing.Pipe()
    process = start(folder, pipe=sending, **settings)
    assert receiving.recv() == "ready"
    started = time.perf_counter()
    changes, seconds = receiving.recv(), time.perf_counter() - started
    process.join()
    assert process.exitcode == 0
    return folder, changes, seconds


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return uninterrupted(tmp_path_factory.mktemp("interruption") / "whole")


@pytest.fixture(scope="module")
def whole_best(tmp_path_factory):
    return uninterrupted(tmp_path_factory.mktemp("interruption") / "best", **BEST)


def kill_after(folder, seconds, **settings):
    """Start or resume a run and kill it some time after training began; returns its exit code."""
    receiving, sending = multiprocessing.Pipe()
    process = start(folder, pipe=sending, **settings)
    assert receiving.recv() == "ready"
    time.sleep(seconds)
    process.kill()
    process.join()
    return process.exitcode


# SIGKILL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.2, 0.8, 0.99])
def test_killed_while_it_changes_files(share, whole, tmp_path):
    folder, changes, _ = whole
    assert run(tmp_path / "run", fatal=round(share * changes)) == -signal.SIGKILL
    assert run(tmp_path / "run") == 0
    assert_same_outcome(tmp_path / "run", folder)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["whole", "whole_best"])
def test_killed_at_random_changes_of_files(reference, request, tmp_path):
    """Twenty runs, each killed in the middle of two random writes, renames or removals of files or folders."""
    folder, changes, _ = request.getfixturevalue(reference)
    settings = BEST if reference == "whole_best" else {}
    draws, places = random.Random(17), []
    for number in range(20):
        killed = tmp_path / str(number)
        assert run(killed, fatal=draws.randint(1, changes), **settings) == -signal.SIGKILL
        places.append(finished_stages(killed))
        run(killed, fatal=draws.randint(1, changes), **settings)
        assert run(killed, **settings) == 0
        assert_same_outcome(killed, folder)
    assert {0, 1} <= set(places)


@pytest.mark.slow
def test_killed_while_checkpoints_and_the_model_are_written(whole, tmp_path):
    """Every second change of files from the last checkpoint on, which ends with the final save."""
    folder, changes, _ = whole
    places = []
    for fatal in range(changes - 45, changes + 1, 2):
        killed = tmp_path / str(fatal)
        assert run(killed, fatal=fatal) == -signal.SIGKILL
        places.append(finished_stages(killed))
        assert run(killed) == 0
        assert_same_outcome(killed, folder)
    assert {1, 2} <= set(places)


@pytest.mark.slow
def test_killed_at_random_moments(whole, tmp_path):
    """Twelve runs, each killed twice at random times."""
    folder, _, seconds = whole
    draws, kills, places = random.Random(7), 0, []
    for number in range(12):
        killed = tmp_path / str(number)
        for _ in range(2):
            kills += kill_after(killed, draws.uniform(0, seconds)) == -signal.SIGKILL
            places.append(finished_stages(killed))
        assert run(killed) == 0
        assert_same_outcome(killed, folder)
    assert kills >= 20
    assert {0, 1} <= set(places)


# Half-written checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture
def stage_folder(tmp_path):
    make_trainer(tmp_path, fresh(), save_strategy="steps", save_steps=2, max_steps=6).train()
    return tmp_path / "0-search"


def test_every_kind_of_damage_is_seen(stage_folder, caplog):
    newest, older = stage_folder / "checkpoint-6", stage_folder / "checkpoint-4"
    assert damage(newest) is None
    assert last_complete_checkpoint(stage_folder) == newest
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= {
        path.name for path in files
    }
    for path in files:
        content = path.read_bytes()
        for spoiled in (content[: len(content) // 2], None):
            path.unlink()
            if spoiled is not None:
                path.write_bytes(spoiled)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                assert last_complete_checkpoint(stage_folder) == older
            assert f"{newest} is half-written" in caplog.text
            assert path.name in caplog.text
            path.write_bytes(content)
    assert last_complete_checkpoint(stage_folder) == newest


def test_a_half_written_checkpoint_that_is_named_is_refused(stage_folder):
    (stage_folder / "checkpoint-4/optimizer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"half-written: optimizer\.pt has 0 bytes"):
        make_trainer(stage_folder.parent, fresh(), max_steps=6).train(
            resume_from_checkpoint=str(stage_folder / "checkpoint-4")
        )


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path):
    make_trainer(tmp_path, fresh(), save_strategy="no", max_steps=1).train()
    ours = ["stages.json.tmp", "first_state.tmp", ".saving-x/model.safetensors", "0-search/model.tmp/config.json"]
    ours += ["1-tune/checkpoint.tmp/checkpoint-3/optimizer.pt"]
    theirs = ["notes.tmp", "figures/plot.tmp", "0-search/model/.saving-x"]
    for name in ours + theirs:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    make_trainer(tmp_path, fresh(), save_strategy="no", max_steps=1).train(resume_from_checkpoint=True)
    assert not any((tmp_path / name).exists() for name in ours)
    assert all((tmp_path / name).exists() for name in theirs)


# Ctrl-C and SIGTERM --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "step", "number", "code"),
    [("search", 2, signal.SIGTERM, 143), ("tune", 5, signal.SIGINT, 130), ("tune", 7, signal.SIGTERM, 143)],
)
def test_signals_save_and_leave(stage, step, number, code, whole, tmp_path):
    killed = tmp_path / "run"
    assert run(killed, signals=(stage, step, number)) == code
    stage_folder = next(killed.glob(f"*-{stage}"))
    assert last_complete_checkpoint(stage_folder).name == f"checkpoint-{step}"
    log = killed.with_suffix(".log").read_text()
    assert f"{number.name}: saving after this step; Ctrl-C leaves at once." in log
    assert f"Stopped by {number.name} after step {step} of the stage {stage}" in log
    assert "--resume_from_checkpoint true" in log
    assert "Traceback" not in log
    assert run(killed) == 0
    assert_same_outcome(killed, whole[0])


def test_second_ctrl_c_leaves_at_once(whole, tmp_path):
    killed = tmp_path / "run"
    assert run(killed, signals=("tune", 5, signal.SIGINT, signal.SIGINT)) == 130
    assert last_complete_checkpoint(killed / "1-tune").name == "checkpoint-3"
    assert run(killed) == 0
    assert_same_outcome(killed, whole[0])


def test_a_run_without_checkpoints_saves_one_when_stopped(tmp_path):
    settings = {"save_strategy": "no"}
    whole, killed = tmp_path / "whole", tmp_path / "run"
    assert run(killed, signals=("search", 4, signal.SIGTERM), **settings) == 143
    assert [path.name for path in killed.glob("*/checkpoint-*")] == ["checkpoint-4"]
    assert run(killed, **settings) == 0
    assert run(whole, **settings) == 0
    assert_same_outcome(killed, whole)


def test_signal_after_the_last_step_ends_after_the_stage(tmp_path):
    """During the evaluation at the end of a stage, the stage is kept first."""

    class Evaluated(Images):
        sent = False

        def __getitem__(self, index):
            if not self.sent:
                self.sent = True
                signal.raise_signal(signal.SIGTERM)
            return super().__getitem__(index)

    settings = {"save_strategy": "no", "max_steps": 1}
    with pytest.raises(SystemExit) as stopped:
        make_trainer(tmp_path, fresh(), eval_dataset=Evaluated(4), **settings).train()
    assert stopped.value.code == 143
    assert finished_stages(tmp_path) == 1
    make_trainer(tmp_path, fresh(), eval_dataset=Images(4), **settings).train(resume_from_checkpoint=True)
    assert finished_stages(tmp_path) == 2


class Watched(Images):
    """Refuses to be read by a worker that a signal to the whole group would end."""

    def __getitem__(self, index):
        if torch.utils.data.get_worker_info() is not None:
            assert {signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} == {signal.SIG_IGN}
        return super().__getitem__(index)


def test_workers_of_every_loader_ignore_signals(tmp_path):
    """Those of training, of evaluation in the middle of it and of the test split."""
    watched = {"train_dataset": Watched(8), "prompted_train_dataset": Watched(8), "eval_dataset": Watched(4)}
    trainer = make_trainer(tmp_path, fresh(), **watched, dataloader_num_workers=1, max_steps=2, save_strategy="no")
    trainer.train()
    trainer.evaluate()
    trainer.predict(Watched(4))


def test_workers_that_have_just_started_ignore_signals(tmp_path):
    """Every fork gets both signals as its first event, as when the whole group is signalled at that moment."""
    forked = []

    def signal_itself():
        for number in forked:
            os.kill(os.getpid(), number)

    os.register_at_fork(after_in_child=signal_itself)
    trainer = make_trainer(
        tmp_path, fresh(), eval_dataset=Images(4), dataloader_num_workers=1, max_steps=2, save_strategy="no"
    )
    forked += [signal.SIGTERM, signal.SIGINT]
    try:
        trainer.train()
        trainer.evaluate()
    finally:
        forked.clear()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_signal_handlers_are_put_back(tmp_path):
    received = []
    interrupts = signal.getsignal(signal.SIGINT)
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with StopSignals(announces=False) as signals:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert signals.received is signal.SIGTERM
            assert received == []
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with StopSignals(announces=False) as signals:
            signal.raise_signal(signal.SIGTERM)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert signal.getsignal(signal.SIGINT) is interrupts


def _recipe(folder, *launcher):
    recipe = TESTS.parent / "recipes" / "prune_vit.py"
    flags = ["--output_dir", str(folder), "--max_steps", "40", "--references", "none", "--use_cpu", "true"]
    return [*launcher, str(recipe), *flags]


def _stop_when_training(command, folder, number):
    """Run a command until it has written a checkpoint folder's sibling, the record, then signal it."""
    log = folder.with_suffix(".txt")
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while not (folder / "stages.json").is_file():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        time.sleep(3)
        process.send_signal(number)
        return process.wait(timeout=120), log.read_text()


@pytest.mark.slow
def test_recipe_stopped_by_ctrl_c(tmp_path):
    folder = tmp_path / "run"
    code, log = _stop_when_training(_recipe(folder, sys.executable), folder, signal.SIGINT)
    assert code == 130, log
    assert "Traceback" not in log
    assert "Stopped by SIGINT after step" in log
    assert len(list(folder.glob("*/checkpoint-*"))) >= 1


@pytest.mark.slow
def test_launched_processes_stop_together(tmp_path):
    """SIGTERM to torchrun, as `accelerate launch` uses it: both agree on the step and leave one checkpoint."""
    folder = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    _, log = _stop_when_training(_recipe(folder, *launcher), folder, signal.SIGTERM)
    assert log.count("Stopped by SIGTERM after step") == 1, log
    (checkpoint,) = folder.glob("*/checkpoint-*")
    assert damage(checkpoint) is None
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}


# What is logged ------------------------------------------------------------------------------------------------------


def test_resumed_log_is_that_of_the_whole_run(whole):
    """The uninterrupted run logs what it should: losses over two steps each, and an evaluation of the last step."""
    logs = outcome(whole[0])["logs"]
    for history in logs.values():
        assert [entry["step"] for entry in history if "loss" in entry] == [2, 4, 6]
        assert [entry["step"] for entry in history if "eval_loss" in entry] == [7, 7]
        assert history[-2]["train_loss"] > 0
    state = json.loads((whole[0] / "1-tune/checkpoint-7/trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [7]
