"""Replace the model in a folder so that a kill at any moment leaves the old or the new one, whole.

The new model is written into a folder of its own inside, which is renamed to `.saved` once it is complete. Its
configuration then takes its place first: from that moment on readers find the new configuration in both places and
take everything from `.saved` (see [`current_folder`]), until the other files are in their places, too.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME

UNFINISHED = ".saving-*"
_COMPLETE = ".saved"
_WEIGHTS = "model*.safetensors*"
_TORCH_WRITER = ("inline_container", "basic_ios", "PytorchStreamWriter")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Write a model inside this context into the folder that it yields; at the end it replaces the one in `folder`.

    Where no configuration was written, as on processes other than the main one, nothing is replaced.

    Args:
        folder: folder of the model, created if needed; files of other kinds in it stay.

    Raises:
        OSError: something cannot be written; an earlier model stays as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Of an earlier save that was killed: its model is the old one now.
    finish_replacing(folder)
    unfinished = Path(tempfile.mkdtemp(dir=folder, prefix=UNFINISHED.rstrip("*")))
    with writing(f"The model in {folder}", unfinished, "; what was there before is as it was"):
        written = unfinished / "model"
        written.mkdir()
        yield written
        if (written / CONFIG_NAME).is_file():
            share_files(written)
            sync_files(written)
            os.replace(written, folder / _COMPLETE)
    remove(unfinished)
    finish_replacing(folder)


def finish_replacing(folder: Path) -> None:
    """Move the files of a complete new model to their places, and remove what a killed save left half-written.

    Args:
        folder: folder of the model.

    Raises:
        OSError: the folder cannot be written; its model can be loaded all the same.
    """
    complete = folder / _COMPLETE
    if not complete.is_dir():
        return
    _remove_unfinished(folder)
    names = {path.name for path in complete.iterdir()}
    for name in sorted(names, key=lambda name: name != CONFIG_NAME):
        _place(complete / name, folder / name)
    for path in folder.glob(_WEIGHTS):
        if path.name not in names:
            path.unlink()
    # Renamed first: readers must not find half of it.
    os.replace(complete, folder / UNFINISHED.replace("*", "done"))
    _remove_unfinished(folder)


def current_folder(folder: Path) -> Path:
    """Return where the model of a folder is to be read: in the folder, or in `.saved` where a save was killed."""
    try:
        is_switched = (folder / CONFIG_NAME).read_bytes() == (folder / _COMPLETE / CONFIG_NAME).read_bytes()
    except OSError:
        return folder
    return folder / _COMPLETE if is_switched else folder


def share_files(folder: Path) -> None:
    """Give the files of a model the permissions of its configuration: safetensors lets nobody but the owner read."""
    mode = (folder / CONFIG_NAME).stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def sync_files(folder: Path) -> None:
    """Wait until all files of a folder are on the disk: a machine that crashes could leave them empty otherwise."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


class UnwrittenError(OSError):
    """A file or folder could not be written.

    Args:
        what: beginning of the sentence, naming the file.
        reason: why, without a full stop.
        advice: end of the sentence.
    """

    def __init__(self, what: str, reason: str, advice: str = ""):
        super().__init__(f"{what} could not be written: {reason}{advice}.")
        self.reason = reason


@contextmanager
def writing(what: str, temporary: Path | None = None, advice: str = "") -> Iterator[None]:
    """Write a file or folder inside this context: a failure is reported in one sentence and leaves nothing behind.

    Args:
        what: beginning of the sentence, naming the file.
        temporary: path that is written to; removed after a failure.
        advice: end of the sentence: state of the earlier files and how to resume.

    Raises:
        UnwrittenError: the disk is full, the folder is read-only, or the like.
    """
    try:
        yield
    except BaseException as error:
        if temporary is not None:
            remove(temporary)
        if reason := _reason(error):
            raise UnwrittenError(what, reason, advice) from error
        raise


def _reason(error: BaseException) -> str | None:
    """Say why a file could not be written; None: the error is about something else."""
    if isinstance(error, UnwrittenError):
        return error.reason
    if isinstance(error, OSError):
        return error.strerror or str(error).rstrip(".")
    text = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, SafetensorError):
        return re.sub(r".*I/O error: (.*) \(os error \d+\)", r"\1", text)
    # torch's writer in C++ does not say why.
    if isinstance(error, RuntimeError) and any(sign in text for sign in _TORCH_WRITER):
        return "the disk is full, or takes no file of this size"
    return None


def remove(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


def _place(source: Path, target: Path) -> None:
    temporary = target.with_name(UNFINISHED.replace("*", target.name))
    try:
        os.link(source, temporary)
    except OSError:  # such as exFAT and some network drives
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob(UNFINISHED):
        remove(path)
