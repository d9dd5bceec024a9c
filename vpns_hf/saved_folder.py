"""Replace the model in a folder so that a kill at any moment leaves the old or the new one, whole.

The new model is written into a folder of its own inside, which is renamed to `.saved` once it is complete. Its
configuration then takes its place first: from that moment on readers find the new configuration in both places and
take everything from `.saved` (see [`current_folder`]), until the other files are in their places, too.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import CONFIG_NAME

UNFINISHED = ".saving-*"
_COMPLETE = ".saved"
_WEIGHTS = "model*.safetensors*"


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
    with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED.rstrip("*")) as name:
        written = Path(name) / "model"
        written.mkdir()
        yield written
        if (written / CONFIG_NAME).is_file():
            sync_files(written)
            os.replace(written, folder / _COMPLETE)
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


def sync_files(folder: Path) -> None:
    """Wait until all files of a folder are on the disk: a machine that crashes could leave them empty otherwise."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _place(source: Path, target: Path) -> None:
    temporary = target.with_name(UNFINISHED.replace("*", target.name))
    try:
        os.link(source, temporary)
    except OSError:  # such as exFAT and some network drives
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob(UNFINISHED):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
