"""Locks on a folder: who holds one, and where there are none."""

import errno
import fcntl
import os
import subprocess
import sys
import time

import pytest
from helpers.training import fresh, make_trainer

from vpns_hf.experiments.results import Cell, claim
from vpns_hf.locks import lock
from vpns_hf.training import run_record

HOLDER = """
import os, sys, time
from filelock import FileLock
os.makedirs(os.path.dirname(sys.argv[1]), exist_ok=True)
with FileLock(sys.argv[1]):
    print(True, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def held(tmp_path):
    """A lock file that another process holds."""
    path = tmp_path / "run" / "run.lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"True\n"
        yield path, process
        process.kill()


def test_a_lock_ends_with_its_process(held):
    path, process = held
    with lock(path) as won:
        assert not won
    process.kill()
    process.wait()
    with lock(path) as won:
        assert won


def test_two_runs_in_one_folder_are_refused(held, monkeypatch):
    path, process = held
    monkeypatch.setattr(run_record, "_PATIENCE", 0.1)
    trainer = make_trainer(path.parent, fresh(), max_steps=1)
    with pytest.raises(ValueError, match=r"Another run is training in .*run; wait .* or choose another `output_dir`"):
        trainer.train()
    assert [file.name for file in path.parent.iterdir()] == ["run.lock"]
    process.kill()
    process.wait()
    trainer.train()
    assert trainer.finished_stages


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EWOULDBLOCK])
def test_file_systems_without_locks_are_refused_at_once(code, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    started = time.monotonic()
    with pytest.raises(OSError, match=r"Nothing in .* can be locked \(.*on a file system with locks"):
        claim(tmp_path, Cell("dense", 0.0, 1)).__enter__()
    with pytest.raises(OSError, match="can be locked"):
        make_trainer(tmp_path, fresh(), max_steps=1).train()
    assert time.monotonic() - started < 5


def test_lock_files_of_other_users(tmp_path, monkeypatch):
    """Root may open every file, so the refusal of the system is played."""
    opened = os.open

    def refuse(path, *arguments, **kwargs):
        if str(path).endswith(".lock"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return opened(path, *arguments, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=r"dense-0\.0-1\.lock may not be written: it belongs to another user"):
        claim(tmp_path, Cell("dense", 0.0, 1)).__enter__()
