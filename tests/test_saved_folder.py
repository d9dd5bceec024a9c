"""Overwriting a saved model: a kill at any moment leaves the old or the new one."""

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_model
from safetensors import SafetensorError
from transformers import AutoModelForImageClassification, ViTImageProcessor, modeling_utils

from vpns_hf import PromptedSparseModel
from vpns_hf.cli.inspection import inspect_folder
from vpns_hf.saved_folder import UnwrittenError, current_folder, replacing, writing

WRITING = os.O_WRONLY | os.O_RDWR
CHANGES = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir")
FORMS = {
    "raw": {"packed": False},
    "raw shards": {"packed": False, "max_shard_size": "20KB"},
    "packed": {"packed": True},
    "packed shards": {"packed": True, "max_shard_size": "10KB"},
}


class Killed(BaseException):
    """Nothing that the library catches."""


class Kill:
    """Stops this process' writing below a folder at its n-th change, as a kill would: nothing is cleaned up either.

    Attributes:
        count: changes so far.
    """

    def __init__(self):
        self.folder, self.fatal, self.count, self.is_dead = "", 0, 0, True
        sys.addaudithook(self._audit)

    @contextmanager
    def at(self, folder, fatal, spoils):
        """Kill at a change (0: never); `spoils`: in the middle of writing the file that was opened last."""
        self.folder, self.fatal, self.count, self.is_dead = str(folder), fatal, 0, False
        self.spoils, self.opened = spoils, None
        try:
            yield self
        except Killed:
            pass
        finally:
            self.folder = ""

    def _audit(self, event, arguments):
        if not self.folder or event not in CHANGES or not isinstance(arguments[0], str | os.PathLike):
            return
        if not os.fspath(arguments[0]).startswith(self.folder):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING):
            return
        self.change()
        self.opened = arguments[0] if event == "open" else None

    def change(self):
        self.count += 1
        if self.is_dead or self.count == self.fatal:
            if not self.is_dead and self.spoils and self.opened is not None and os.path.exists(self.opened):
                self.folder, folder = "", self.folder
                os.truncate(self.opened, os.path.getsize(self.opened) // 2)
                self.folder = folder
            self.is_dead = True
            raise Killed


@pytest.fixture(scope="module")
def kill():
    return Kill()


@pytest.fixture(autouse=True)
def _seen_writing(kill, monkeypatch):
    """safetensors writes in Rust, where Python's audit sees nothing."""
    write = modeling_utils.safe_save_file

    def watched(tensors, path, *args, **kwargs):
        if kill.folder and str(path).startswith(kill.folder):
            kill.change()
            kill.opened = path
        write(tensors, path, *args, **kwargs)

    monkeypatch.setattr(modeling_utils, "safe_save_file", watched)


def make_model(sparsity, num_labels=6):
    """A frozen model with an image processor; configurations differ by sparsity and labels."""
    model = tiny_model(sparsity=sparsity, num_labels=num_labels)
    model.freeze_masks()
    model.image_processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[sparsity] * 3)
    return model


def facts(model):
    state = model.state_dict()
    config = {"sparsity": model.config.sparsity, "labels": model.config.num_labels}
    return config, model.image_processor.image_mean, {name: tensor.clone() for name, tensor in state.items()}


def is_same(found, expected):
    return found[:2] == expected[:2] and all(torch.equal(found[2][name], expected[2][name]) for name in expected[2])


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def remove(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


class Overwritten:
    """A folder in which a model is overwritten by another, again and again."""

    def __init__(self, folder, before, after, other_config):
        self.folder, self.before, self.after = folder / "model", before, after
        self.old = make_model(0.5)
        self.new = make_model(0.75, num_labels=5) if other_config else make_model(0.5)
        self.old_facts, self.new_facts = facts(self.old), facts(self.new)
        self.prepare()
        self.finish()
        self.expected = files(self.folder)

    def prepare(self):
        if self.folder.exists():
            remove(self.folder)
        self.folder.mkdir()
        (self.folder / "notes.txt").write_text("of the user")
        self.old.save_pretrained(self.folder, **FORMS[self.before])

    def finish(self):
        self.new.save_pretrained(self.folder, **FORMS[self.after])

    def check(self):
        """Whether it is the new model that loads; the same by every way in. And the next save leaves nothing else."""
        found = facts(PromptedSparseModel.from_pretrained(self.folder))
        assert is_same(found, facts(AutoModelForImageClassification.from_pretrained(self.folder)))
        is_new = is_same(found, self.new_facts)
        assert is_new or is_same(found, self.old_facts)
        shown = self.before if not is_new else self.after
        if shown != "raw shards":
            masks = (self.new if is_new else self.old).masks().values()
            assert inspect_folder(self.folder).kept == sum(int(mask.sum()) for mask in masks)
        self.finish()
        assert files(self.folder) == self.expected
        return is_new


def check_kill_points(kill, place, spoiled):
    """Kill at every change; returns how many there are."""
    fatal, seen = 1, []
    while True:
        for spoils in spoiled:
            place.prepare()
            with kill.at(place.folder, fatal, spoils):
                place.finish()
            if not kill.is_dead:
                assert True in seen
                assert False in seen
                # Once the new model is there, it stays.
                assert seen == sorted(seen)
                return len(seen)
            seen.append(place.check())
        fatal += 1


def test_killed_at_every_change_while_a_model_is_overwritten(kill, tmp_path):
    assert check_kill_points(kill, Overwritten(tmp_path, "raw", "packed", other_config=True), [True]) >= 15


PAIRS = [("raw", "packed"), ("packed", "packed shards"), ("packed shards", "raw shards"), ("raw shards", "raw")]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), PAIRS)
@pytest.mark.parametrize("other_config", [True, False])
def test_killed_at_every_change_in_every_form(before, after, other_config, kill, tmp_path, record_property):
    points = check_kill_points(kill, Overwritten(tmp_path, before, after, other_config), [False, True])
    print(f"{points} kill points")
    assert points >= 30


def half_switch(kill, place):
    """Kill a save when the new configuration has just taken its place."""
    fatal = 0
    while current_folder(place.folder) == place.folder:
        fatal += 1
        place.prepare()
        with kill.at(place.folder, fatal, False):
            place.finish()
        assert kill.is_dead


@pytest.mark.parametrize("number", [1, 2, 4, 6, 8, 10])
def test_killed_while_an_earlier_kill_is_repaired(number, kill, tmp_path):
    """The next save is killed, too: what is in `.saved`, and partly in its place, is the old model then."""
    place = Overwritten(tmp_path, "raw", "packed", other_config=True)
    half_switch(kill, place)
    last = make_model(0.25, num_labels=4)
    with kill.at(place.folder, number, True):
        last.save_pretrained(place.folder)
    assert kill.is_dead
    assert is_same(facts(PromptedSparseModel.from_pretrained(place.folder)), place.new_facts)
    last.save_pretrained(place.folder)
    assert is_same(facts(PromptedSparseModel.from_pretrained(place.folder)), facts(last))
    assert files(place.folder) == place.expected


def test_folders_on_file_systems_without_hard_links(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("os.link", refuse)
    place = Overwritten(tmp_path, "raw", "packed", other_config=True)
    assert is_same(facts(PromptedSparseModel.from_pretrained(place.folder)), place.new_facts)


def test_a_failed_save_leaves_the_old_model_and_nothing_else(tmp_path):
    def save():
        with replacing(tmp_path) as folder:
            (folder / "config.json").write_text('{"a": 1}')
            raise OSError("full")

    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OSError, match="full"):
        save()
    assert files(tmp_path) == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_model_in_a_subfolder(kill, tmp_path):
    place = Overwritten(tmp_path, "raw", "packed", other_config=True)
    half_switch(kill, place)
    found = PromptedSparseModel.from_pretrained(tmp_path, subfolder="model")
    assert is_same(facts(found), place.new_facts)
    assert found.name_or_path == str(tmp_path)


SAVER = """
import sys
sys.path[:0] = sys.argv[1:2]
from pathlib import Path
from test_saved_folder import FORMS, PromptedSparseModel
models = [PromptedSparseModel.from_pretrained(Path(sys.argv[2]) / name) for name in ("even", "odd")]
print("ready", flush=True)
for number in range(1000):
    models[number % 2].save_pretrained(Path(sys.argv[2]) / "model", **list(FORMS.values())[number % 4])
"""


@pytest.mark.slow
def test_killed_at_random_moments_while_models_are_overwritten(tmp_path):
    """Sixty processes that save two models by turns in every form, each killed at a random moment."""
    models = {"even": make_model(0.5), "odd": make_model(0.75, num_labels=5)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    models["even"].save_pretrained(tmp_path / "model")
    draws, seen = random.Random(3), []
    for _ in range(60):
        command = [sys.executable, "-c", SAVER, str(Path(__file__).parent), str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(draws.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
        found = facts(PromptedSparseModel.from_pretrained(tmp_path / "model"))
        (name,) = [name for name, model in models.items() if is_same(found, facts(model))]
        seen.append(name)
    assert {"even", "odd"} == set(seen)
    models["even"].save_pretrained(tmp_path / "model")
    assert files(tmp_path / "model") == files(tmp_path / "even")


# Permissions and full disks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
@pytest.mark.parametrize("form", FORMS)
def test_saved_files_have_the_usual_permissions(umask, mode, form, tmp_path):
    before = os.umask(umask)
    try:
        make_model(0.5).save_pretrained(tmp_path, **FORMS[form])
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}


@pytest.mark.parametrize("form", FORMS)
def test_full_disk(form, tmp_path):
    """One sentence that names the folder, and the old model stays."""
    model = make_model(0.5)
    model.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"^The model in /.* could not be written: File too large; .* as it was\.$"):
            make_model(0.75).save_pretrained(tmp_path, **FORMS[form])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534\n#0 x"),
            "the disk is full",
        ),
        (RuntimeError("basic_ios::clear: iostream error"), "the disk is full"),
        (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), "File too large"),
        (UnwrittenError("The model in x", "File too large"), "File too large"),
    ],
)
def test_what_libraries_say_of_a_full_disk_is_one_sentence(error, reason, tmp_path):
    def fail():
        with writing("The checkpoint in y", tmp_path / "z", "; make room"):
            (tmp_path / "z").mkdir()
            raise error

    with pytest.raises(OSError, match=rf"^The checkpoint in y could not be written: {reason}(, .*)?; make room\.$"):
        fail()
    assert not (tmp_path / "z").exists()


def test_the_disk_is_not_blamed_for_other_errors(tmp_path):
    def fail():
        with writing("The checkpoint in y", tmp_path / "z"):
            raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly")

    with pytest.raises(RuntimeError, match="DataLoader worker"):
        fail()
