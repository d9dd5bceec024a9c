"""Hold measured latencies, a row for each runtime, batch size and number of threads, and compute figures from them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any, Self

from ..inference import Spread, processor_name, ratios

REFERENCE = "torch"
SPARSE = "sparse"
INT8 = "onnxruntime-int8"
PACKAGES = ("torch", "transformers")


@dataclass(frozen=True)
class Machine:
    """Machine that times are of.

    Args:
        processor: name of the processor.
        cores: cores that the system shows.
        load: processes that wanted a core in the minute before, on average; None where the system does not tell.
        packages: versions of the packages that ran the model, by name.
    """

    processor: str
    cores: int
    load: float | None
    packages: dict[str, str]

    @classmethod
    def this(cls, packages: Sequence[str] = ()) -> Self:
        """Describe this machine, with the versions of further packages."""
        versions = {name: version(name) for name in dict.fromkeys([*PACKAGES, *packages])}
        load = round(os.getloadavg()[0], 1) if os.name == "posix" else None
        return cls(processor_name(), os.cpu_count() or 1, load, versions)


@dataclass(frozen=True)
class Latency:
    """Times of one runtime with one batch size and number of threads.

    Args:
        runtime: key of [`RUNTIMES`].
        batch: images at a time.
        threads: threads that computed them.
        seconds: time of the batch in each round; rounds of rows with the same batch and threads took turns.
        file_bytes: size of what the runtime loads: the packed file, an ONNX file, or all tensors of the dense model.
        memory_bytes: growth of resident memory to its peak in a process that loads and runs the model; None where the
            system does not tell.
        accuracy: accuracy in [0, 1]; None where it is not known.
        note: how the runtime runs the model, where that is not the same for all models; or None.
    """

    runtime: str
    batch: int
    threads: int
    seconds: tuple[float, ...]
    file_bytes: int
    memory_bytes: int | None = None
    accuracy: float | None = None
    note: str | None = None

    @property
    def milliseconds(self) -> Spread:
        """Time of a batch in milliseconds."""
        return Spread.of([1000 * each for each in self.seconds])

    @property
    def images_per_second(self) -> float:
        """Images a second, at the median time."""
        return 1000 * self.batch / self.milliseconds.median


@dataclass(frozen=True)
class LatencyReport:
    """All that was measured of a model on one machine.

    Args:
        machine: the machine.
        sparsity: fraction of the prunable weights that are masked.
        image_size: (height, width) of the images.
        rows: by number of threads, batch size and runtime, as requested.
        left_out: the reason by the name of each runtime that was not measured.
        int8: how activations were quantised, `"static"` or `"dynamic"`; None where nothing was.
        accuracy_of: data that the accuracies are of, such as "days, test split, 100 images"; None without.
        dense_accuracy: accuracy of the dense model on these data, in [0, 1]; None where it is not known.
    """

    machine: Machine
    sparsity: float
    image_size: tuple[int, int]
    rows: tuple[Latency, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    int8: str | None = None
    accuracy_of: str | None = None
    dense_accuracy: float | None = None

    def groups(self) -> dict[tuple[int, int], dict[str, Latency]]:
        """Group the rows that took turns: (batch, threads), and their rows by runtime."""
        found: dict[tuple[int, int], dict[str, Latency]] = {}
        for row in self.rows:
            found.setdefault((row.batch, row.threads), {})[row.runtime] = row
        return found

    def speedup(self, row: Latency, reference: str = REFERENCE) -> Spread | None:
        """Compute how many times as fast as another runtime a row is, round by round.

        Args:
            row: one of the rows.
            reference: runtime to compare with, at the same batch size and number of threads.

        Returns:
            Median and quartiles of the ratios; None where the other runtime was not measured.
        """
        other = self.groups()[row.batch, row.threads].get(reference)
        return None if other is None else Spread.of(ratios(other.seconds, row.seconds))

    def with_accuracy(self, accuracy: float, accuracy_of: str, dense_accuracy: float | None) -> Self:
        """Add an accuracy that is known of the model, which is that of every runtime in float32.

        Args:
            accuracy, accuracy_of, dense_accuracy: as of [`Latency`] and [`LatencyReport`].
        """
        rows = tuple(row if row.runtime == INT8 else replace(row, accuracy=accuracy) for row in self.rows)
        return replace(self, rows=rows, accuracy_of=accuracy_of, dense_accuracy=dense_accuracy)

    def to_json(self) -> str:
        """Format everything that was measured, and the figures that follow from it, as a JSON object."""
        return json.dumps(asdict(self) | {"rows": [self._figures(row) for row in self.rows]}, indent=2) + "\n"

    def _figures(self, row: Latency) -> dict[str, Any]:
        speedup = self.speedup(row)
        return {
            **{name: value for name, value in asdict(row).items() if name != "seconds"},
            "milliseconds": asdict(row.milliseconds),
            "images_per_second": row.images_per_second,
            "times_as_fast_as_dense_torch": None if speedup is None else asdict(speedup),
            "seconds": row.seconds,
        }

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Self:
        """Rebuild the report from the fields of `asdict`, or of [`~LatencyReport.to_json`]."""
        own = {name: facts[name] for name in cls.__dataclass_fields__}
        rows = tuple(
            Latency(**{name: row[name] for name in Latency.__dataclass_fields__} | {"seconds": tuple(row["seconds"])})
            for row in facts["rows"]
        )
        height, width = facts["image_size"]
        return cls(**own | {"machine": Machine(**facts["machine"]), "rows": rows, "image_size": (height, width)})
