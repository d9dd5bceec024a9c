"""Lock files, which the operating system releases when their process ends in any way."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def lock(path: Path, timeout: float = 0) -> Iterator[bool]:
    """Hold a lock file for the length of a `with` block; yield whether it was won.

    Args:
        path: the lock file, created with its folder if missing; it stays.
        timeout: seconds to wait for another process that holds it.

    Raises:
        OSError: the lock file cannot be written, as one of another user, or the file system has no working locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(path, timeout=timeout)
    try:
        _check_locks_work(path.parent)
        held.acquire()
        won = True
    except Timeout:
        won = False
    except PermissionError as error:
        raise OSError(
            f"{path} may not be written: it belongs to another user, or its folder may only be read; ask for write "
            "permission, or choose another `output_dir`."
        ) from error
    try:
        yield won
    finally:
        held.release()


def _check_locks_work(folder: Path) -> None:
    """Raise where locking fails although nobody else can hold the lock; waiting for it would never end."""
    if os.name != "posix":
        return
    import fcntl

    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OSError(
                f"Nothing in {folder} can be locked ({error.strerror}), so that two processes could write the same "
                "files; choose an `output_dir` on a file system with locks, such as a local disk."
            ) from error
