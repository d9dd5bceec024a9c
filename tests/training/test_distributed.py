"""Several processes: the same masks as one, the same metrics, sharded as whole, and an end when one of them dies.

Real processes are started, by accelerate's launcher with the configurations that are shipped; each launch has a time
limit. `distributed_worker.py` is what they run.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.distributed_worker import LEARNED, VARIANTS, data, run
from helpers.training import fresh, history, make_trainer
from safetensors.torch import load_file

from vpns_hf import VPNsTrainingArguments

TESTS = Path(__file__).parents[1]
CONFIGS = TESTS.parent / "recipes/accelerate_configs"


def launch(job, folder, config="ddp_cpu", timeout=300, processes=2, **environment):
    """Run a job of the worker; returns how it ended. Nothing survives the time limit."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    command += ["--num_processes", str(processes), "--main_process_port", "0"]
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [*command, str(TESTS / "helpers/distributed_worker.py"), job, str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # The launcher ends its processes with itself.
        process.terminate()
        output, _ = process.communicate(timeout=60)
        raise AssertionError(f"{job} took more than {timeout} s:\n{output[-4000:]}") from None
    return process.returncode, output


def launch_whole(job, folder, **kwargs):
    """Run a job that must succeed."""
    code, output = launch(job, folder, **kwargs)
    assert code == 0, output[-6000:]
    assert f"{job} done" in output


def assert_same_run(folder, expected, exactly=False):
    """The model after each stage and the metrics of all stages: masks equal, the rest equal or close."""
    stages = sorted(path.name for path in expected.glob("?-*"))
    assert stages
    for stage in stages:
        state, other = (load_file(path / stage / "model/model.safetensors") for path in (folder, expected))
        assert set(state) == set(other)
        for name, tensor in state.items():
            if exactly or tensor.dtype == torch.bool:
                assert torch.equal(tensor, other[name]), name
            else:
                torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-6)
    records = [json.loads((path / "stages.json").read_text())["finished"] for path in (folder, expected)]
    for stage, other in zip(*records, strict=True):
        assert (stage["steps"], stage["cost"]["images"]) == (other["steps"], other["cost"]["images"])
        for name, value in other["metrics"].items():
            if not name.endswith(("runtime", "per_second")):
                assert stage["metrics"][name] == pytest.approx(value, rel=1e-4), name


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """What the job `ddp` leaves, run once for all tests of this module."""
    folder = tmp_path_factory.mktemp("ddp")
    launch_whole("ddp", folder)
    return folder


def test_two_processes_equal_one_with_twice_the_batch(ddp, tmp_path):
    """In both stages; seven validation images on two processes make an uneven last batch."""
    run(tmp_path, per_device_train_batch_size=4)
    assert_same_run(ddp / "even", tmp_path)


@pytest.mark.parametrize("name", LEARNED)
def test_methods_on_two_processes_equal_one_with_twice_the_batch(ddp, tmp_path, name):
    """Scores, weights and prompt together at a learning rate that is found; a teacher tuned first."""
    run(tmp_path, per_device_train_batch_size=4, **LEARNED[name])
    assert_same_run(ddp / name, tmp_path)


def test_uneven_last_batch_equals_accumulation_on_one_process(ddp, tmp_path):
    """Fifteen images in steps of four: the last step is made complete in the same way."""
    run(tmp_path, length=15, gradient_accumulation_steps=2)
    assert_same_run(ddp / "uneven", tmp_path)


def test_processes_that_differ_are_found_on_all_of_them(ddp):
    """One entry changed by the smallest amount, or one mask shifted, on the second process after step 2."""
    for rank in range(2):
        found = json.loads((ddp / f"consistency-{rank}.json").read_text())
        assert set(found) == {"scores", "masks", "prompt", "weights"}
        for kind, message in found.items():
            assert message.startswith(f"The processes hold different {kind} after step 2: process 1 against process 0")


def test_sharded_models_equal_whole_ones(ddp):
    """Asserted inside: `sharded_selection` and `sharded_model` of the worker, which the same launch runs last."""
    assert (ddp / "sharded").is_file()


def test_sharded_models_in_patterns_equal_whole_ones(tmp_path):
    """Asserted inside: `patterns` of the worker."""
    launch_whole("patterns", tmp_path)
    assert (tmp_path / "sharded").is_file()


def test_one_process_killed_ends_all(tmp_path):
    started = time.monotonic()
    code, output = launch("killed", tmp_path, timeout=180)
    assert code != 0
    assert "SIGKILL" in output
    assert "killed done" not in output
    assert time.monotonic() - started < 150


def test_fsdp_is_refused_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="no FSDP on CPUs; launch with"):
        VPNsTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    with pytest.raises(ValueError, match="`consistency_check_steps` is -1"):
        VPNsTrainingArguments(output_dir=str(tmp_path), consistency_check_steps=-1)


def test_one_process_compares_nothing(tmp_path):
    trainer = make_trainer(tmp_path, fresh(), consistency_check_steps=1, **data(16))
    assert "ConsistencyCheck" not in [type(callback).__name__ for callback in trainer.callback_handler.callbacks]


@pytest.mark.slow
def test_two_processes_resumed_equal_the_uninterrupted_run(tmp_path):
    launch_whole("resumed", tmp_path, timeout=500)
    for stage in ("search", "tune"):
        assert_same_run(tmp_path / stage, tmp_path / "whole", exactly=True)
        assert history(tmp_path / stage) == history(tmp_path / "whole")
    checkpoint = sorted(path.name for path in (tmp_path / "whole/0-search/checkpoint-2").iterdir())
    # The random state is each process's own, all else is written once.
    assert checkpoint == [
        "checkpoint_files.json",
        "config.json",
        "model.safetensors",
        "optimizer.pt",
        "rng_state_0.pth",
        "rng_state_1.pth",
        "scheduler.pt",
        "trainer_state.json",
    ]


@pytest.mark.slow
def test_two_processes_with_accumulation_equal_one(tmp_path):
    launch_whole("accumulated", tmp_path / "two")
    run(tmp_path / "one", per_device_train_batch_size=4)
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp2", "deepspeed_zero2"])
def test_a_configuration_that_cannot_run_says_so(config, tmp_path):
    if config == "deepspeed_zero2" and importlib.util.find_spec("deepspeed"):
        pytest.skip("DeepSpeed is installed")
    code, output = launch("ddp", tmp_path, config=config)
    reason = {"fsdp2": "accelerate has no FSDP on CPUs", "deepspeed_zero2": "DeepSpeed is not installed"}[config]
    assert code != 0
    assert reason in output


@pytest.mark.slow
def test_trainer_with_fsdp2_pretended_on_cpus(tmp_path):
    """accelerate is told that CPUs are GPUs, so that all of its FSDP2 runs but nccl: equal to DDP, resumed too."""
    launch_whole("fsdp2_on_cpu", tmp_path / "fsdp2", config="fsdp2", timeout=500)
    launch_whole("variants", tmp_path / "ddp", timeout=500)
    assert_same_variants(tmp_path / "fsdp2", tmp_path / "ddp")


def assert_same_variants(fsdp2, ddp):
    for name in VARIANTS:
        assert_same_run(fsdp2 / name, ddp / name)
    assert_same_run(fsdp2 / "stopped", fsdp2 / "plain")
    assert (fsdp2 / "plain/model.safetensors").is_file()


@pytest.mark.slow
def test_trainer_with_zero2_on_cpus(tmp_path):
    """DeepSpeed's own support of CPUs, with gloo: equal to DDP, resumed too."""
    pytest.importorskip("deepspeed")
    launch_whole("resumed", tmp_path / "zero2", config="deepspeed_zero2", timeout=500, DS_ACCELERATOR="cpu")
    launch_whole("resumed", tmp_path / "ddp", timeout=500)
    for name in ("whole", "search", "tune"):
        assert_same_run(tmp_path / "zero2" / name, tmp_path / "ddp" / name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA devices")
def test_trainer_with_fsdp2(tmp_path):
    """On all GPUs of this machine: equal to DDP on them, resumed too."""
    gpus = dict(processes=torch.cuda.device_count(), timeout=500)
    launch_whole("fsdp2", tmp_path / "fsdp2", config="fsdp2", **gpus)
    launch_whole("variants", tmp_path / "ddp", config="ddp", **gpus)
    assert_same_variants(tmp_path / "fsdp2", tmp_path / "ddp")
