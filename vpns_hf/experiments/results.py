"""Store the results of cells, one line of JSON each, safely for several writers."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import quote

from ..locks import lock
from ..saved_folder import writing

logger = logging.getLogger(__name__)
DENSE = "dense"
FULL = "full"
# Seconds to wait for another process that appends a line, which takes milliseconds.
_PATIENCE = 60


@dataclass(frozen=True)
class Cell:
    """A run of a comparison or transfer.

    Args:
        method: name of the pruning method; `"dense"` is the reference.
        sparsity: fraction of the prunable weights to remove; 0 for the reference.
        seed: seed of the new head, the order of the data and every other random draw.
        task: target task of a transferred mask; None where masks are found on the task itself.
        mode: name of the way to train on the target task; None as for `task`.
    """

    method: str
    sparsity: float
    seed: int
    task: str | None = None
    mode: str | None = None

    def __str__(self) -> str:
        parts = (self.task, self.method, self.mode, f"sparsity {self.sparsity:.0%}", f"seed {self.seed}")
        return ", ".join(part for part in parts if part is not None)


def row_name(method: str, mode: str | None) -> str:
    """Return the name of a row in tables: the method, and the mode unless it is `"full"`."""
    return method if mode in (None, FULL) else f"{method}, {mode}"


_AMOUNTS = (
    "steps",
    "warm_up_steps",
    "images",
    "forward_images",
    "backward_images",
    "seconds",
    "trained_weights",
    "teacher_steps",
    "teacher_images",
)


@dataclass(frozen=True)
class CellResult:
    """Accuracy and cost of one run.

    Args:
        method, sparsity, seed: the cell; the sparsity is the target.
        accuracy: test accuracy without the prompt, in [0, 1].
        accuracy_prompted: test accuracy with the prompt, in [0, 1]; None where there is none.
        validation_accuracy: in [0, 1]; None where it was not measured.
        measured_sparsity: fraction of the prunable weights that are zero by the mask.
        steps: optimizer steps, without those of the warm-up of a new head.
        warm_up_steps: optimizer steps of that warm-up.
        images: number of training images seen.
        forward_images, backward_images: numbers of images that passed forward and backward through the backbone, for
            training and scoring.
        seconds: duration of training and scoring, without evaluation.
        trained_weights: number of weights trained in the last stage.
        splits: choices, such as that of the checkpoint, and the split that each was made on.
        settings: short digest of everything that must be equal for two results to be comparable.
        task, mode: the cell.
        mask_steps: optimizer steps that found the mask on the source task, without its warm-up; None where the mask
            was found on the task itself or is a shared one.
        teacher_steps: optimizer steps that tuned a teacher first; none of their cost is in the other numbers.
        teacher_images: number of images that passed forward through a teacher.
        metrics: further metrics of the test split without the prompt, by name, as fractions.

    Raises:
        ValueError: a number is out of its range.
    """

    method: str
    sparsity: float
    seed: int
    accuracy: float
    accuracy_prompted: float | None
    validation_accuracy: float | None
    measured_sparsity: float
    steps: int
    warm_up_steps: int
    images: int
    forward_images: int
    backward_images: int
    seconds: float
    trained_weights: int
    splits: dict[str, str]
    settings: str
    task: str | None = None
    mode: str | None = None
    mask_steps: int | None = None
    teacher_steps: int = 0
    teacher_images: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("sparsity", "measured_sparsity", "accuracy", "accuracy_prompted", "validation_accuracy"):
            check_range(name, vars(self)[name], 1)
        for name in _AMOUNTS:
            check_range(name, vars(self)[name], math.inf)

    @property
    def cell(self) -> Cell:
        """Return the run that this is the result of."""
        return Cell(self.method, self.sparsity, self.seed, self.task, self.mode)

    @property
    def row(self) -> str:
        """Name of its row in tables."""
        return row_name(self.method, self.mode)

    def to_line(self) -> str:
        """Return one line of JSON, without a newline at its end."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_line(cls, line: str) -> CellResult:
        """Parse a line of [`~CellResult.to_line`].

        Args:
            line: JSON object with all fields.

        Raises:
            ValueError: the line is no result.
        """
        try:
            return cls(**json.loads(line))
        except TypeError as error:
            raise ValueError(f"This is no result of a cell: {error}.") from error


def check_range(name: str, value: float | None, most: float) -> None:
    """Raise unless a value is None or lies between 0 and `most`."""
    if value is not None and not 0 <= value <= most:
        raise ValueError(f"`{name}` is {value}; expected a number from 0 to {most}.")


# Ends a line that a kill truncated, which would otherwise count as damaged.
_CUT_OFF = "# cut off"


def read_results(path: str | os.PathLike[str]) -> list[CellResult]:
    """Read the results of a file, one JSON line each.

    A line that a kill truncated is skipped with a warning: its cell counts as not run. Of two results of one cell with
    the same settings the first counts.

    Args:
        path: file; a missing one holds no results.

    Raises:
        ValueError: a whole line is no result.
    """
    path = Path(path)
    if not path.exists():
        return []
    *lines, rest = path.read_bytes().decode(errors="replace").split("\n")
    results = []
    for number, line in enumerate(lines, start=1):
        if line.endswith(_CUT_OFF):
            logger.warning("Line %d of %s is cut off and skipped.", number, path)
            continue
        try:
            results.append(CellResult.from_line(line))
        except ValueError as error:
            raise ValueError(f"Line {number} of {path} is damaged: {error}") from error
    if rest:
        logger.warning("The last line of %s is cut off and skipped.", path)
    return distinct_results(results)


def append_result(path: str | os.PathLike[str], result: CellResult) -> None:
    """Append one line to the file of results atomically, as other processes of this machine see it.

    Args:
        path: file, created with its folders if missing.
        result: result of a cell.

    Raises:
        OSError: the line could not be written whole, as on a full disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        # Half of a line that another process is writing would look truncated.
        with lock(path.with_name(f"{path.name}.lock"), _PATIENCE) as is_ours:
            if not is_ours:
                raise OSError(
                    f"Another process has been writing to {path} for {_PATIENCE} seconds; the result is lost."
                )
            line = f"{_end_cut_off_line(file)}{result.to_line()}\n".encode()
            with writing(f"A result in {path}", advice="; make room and start again, which adds it"):
                if os.write(file, line) < len(line):
                    raise OSError("the disk is full")
                os.fsync(file)
    finally:
        os.close(file)


def _end_cut_off_line(file: int) -> str:
    """Return the text that ends a truncated last line; empty unless the file ends within a line."""
    if not (size := os.fstat(file).st_size):
        return ""
    os.lseek(file, size - 1, os.SEEK_SET)
    return "" if os.read(file, 1) == b"\n" else f"{_CUT_OFF}\n"


def distinct_results(results: Iterable[CellResult]) -> list[CellResult]:
    """Keep the first result of every cell and setting."""
    first: dict[tuple[Cell, str], CellResult] = {}
    for result in results:
        first.setdefault((result.cell, result.settings), result)
    return list(first.values())


@contextmanager
def claim(folder: str | os.PathLike[str], cell: Cell) -> Iterator[bool]:
    """Claim a cell for the length of a `with` block, so that no other process that claims cells runs it as well.

    The operating system releases the claim of a process that ends in any way. Another process may have finished the
    cell just before it was claimed, so read the results again once the claim is won.

    Args:
        folder: folder of the lock files, one a cell, created if missing.
        cell: cell to run.

    Returns:
        Whether the claim was won.

    Raises:
        OSError: the lock file belongs to another user, or the file system has no working locks.
    """
    parts = (cell.method, cell.sparsity, cell.seed, cell.task, cell.mode)
    name = quote("-".join(str(part) for part in parts if part is not None) + ".lock", safe="")
    with lock(Path(folder) / name) as won:
        yield won
