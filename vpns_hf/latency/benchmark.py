"""Measure a saved subnetwork in every runtime, in processes that take turns."""

from __future__ import annotations

import copy
import functools
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import Tensor

from ..export import export_onnx, quantize_onnx
from ..export.plain import sample_images
from ..hub import WEIGHTS
from ..model.modeling import PromptedSparseModel
from .measured import INT8, REFERENCE, SPARSE, Latency, LatencyReport, Machine
from .processes import RuntimeFailure, RuntimeProcess, runtime_processes
from .runtimes import RUNTIMES, Images

# Largest difference of logits, as a share of the largest logit, between a runtime and torch.
_TOLERANCE = 1e-3

T = TypeVar("T")


@dataclass(frozen=True)
class LabelledImages:
    """Images to measure accuracy on, and others to calibrate int8 with.

    Args:
        name: name of the data, for the report.
        batches: of `pixel_values`, normalised images [n, channels, height, width], and `labels`, classes [n].
        calibration: batches of `pixel_values` that accuracy is not measured on.
    """

    name: str
    batches: Iterable[Mapping[str, Tensor]]
    calibration: Iterable[Mapping[str, Tensor]]


def benchmark(
    folder: Path,
    runtimes: Sequence[str] = tuple(RUNTIMES),
    batches: Sequence[int] = (1, 8),
    threads: Sequence[int] = (1, 2),
    rounds: int = 15,
    images: LabelledImages | None = None,
) -> LatencyReport:
    """Measure latency, memory, sizes and, with images, accuracy of a subnetwork in every runtime.

    Each runtime has a process of its own, and these take turns with every batch size and number of threads. All
    compute in float32 but `"onnxruntime-int8"`. A runtime that is not installed or cannot run the model is left out,
    with the reason.

    Args:
        folder: what `save_pretrained` or a download left.
        runtimes: keys of [`RUNTIMES`].
        batches: images at a time.
        threads: threads that compute them.
        rounds: turns of each runtime.
        images: images with their classes; without, int8 activations are quantised dynamically.

    Raises:
        ValueError: the masks are not frozen, a number is not possible, or no runtime is left.
        OSError: the folder cannot be read.
    """
    _check_numbers(batches, threads, rounds)
    model = PromptedSparseModel.from_pretrained(folder).float().eval()
    if model.config.state != "frozen":
        raise ValueError(
            f"Latency is measured of subnetworks with frozen masks, and {folder} holds a model in the "
            f"{model.config.state!r} state; call `freeze_masks()` and save it again."
        )
    example = sample_images(model.config, max(batches)).numpy()
    left_out = {
        name: f"not installed ({', '.join(missing)})" for name in runtimes if (missing := RUNTIMES[name].missing())
    }
    wanted = [name for name in dict.fromkeys(runtimes) if name not in left_out]
    rows: list[Latency] = []
    accuracies: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        files = _write_files(model, folder, Path(scratch), wanted, images)
        left_out |= files.failed
        for count in sorted(set(threads)):
            sources = {name: path for name, path in files.paths.items() if name not in left_out}
            with runtime_processes(sources, count) as processes:
                turns = _Turns(processes, files, example, rounds, left_out)
                rows += [row for batch in sorted(set(batches)) for row in turns.measure(batch, count)]
                if images is not None and count == max(threads):
                    accuracies = turns.accuracies(images)
    if not rows:
        raise ValueError(f"No runtime could be measured: {'; '.join(': '.join(each) for each in left_out.items())}.")
    height, width = example.shape[2:]
    return LatencyReport(
        machine=Machine.this([RUNTIMES[row.runtime].package for row in rows]),
        sparsity=model.sparsity,
        image_size=(height, width),
        rows=tuple(replace(row, accuracy=accuracies.get(row.runtime)) for row in rows),
        left_out=left_out,
        int8=files.int8,
        accuracy_of=None if images is None else images.name,
    )


def _check_numbers(batches: Sequence[int], threads: Sequence[int], rounds: int) -> None:
    cores = os.cpu_count() or 1
    if min(*batches, *threads) < 1 or rounds < 2:
        raise ValueError("Batch sizes and threads are at least 1, and rounds at least 2.")
    if max(threads) > cores:
        raise ValueError(
            f"`threads` has {max(threads)}, and this machine has {cores} cores; expected at most as many."
        )


@dataclass(frozen=True)
class _Files:
    """Files that the runtimes load.

    Args:
        paths: of what each runtime loads.
        sizes: bytes that a model takes in each runtime.
        failed: why there is none for a runtime.
        int8: how activations were quantised, or None.
    """

    paths: dict[str, Path]
    sizes: dict[str, int]
    failed: dict[str, str]
    int8: str | None = None


def _write_files(
    model: PromptedSparseModel, folder: Path, scratch: Path, runtimes: Sequence[str], images: LabelledImages | None
) -> _Files:
    """Export the model for each kind of runtime."""
    plain = copy.deepcopy(model).merge_and_unload()
    sizes = {
        REFERENCE: sum(tensor.nbytes for tensor in plain.state_dict().values()),
        SPARSE: sum(path.stat().st_size for pattern in WEIGHTS[:1] for path in folder.glob(pattern)),
    }
    int8: str | None = None
    sources = {"folder": folder}
    failed: dict[str, str] = {}
    kinds = {RUNTIMES[name].source for name in runtimes}
    try:
        if kinds & {"onnx", "int8"}:
            export_onnx(model, scratch / "model.onnx")
            sources["onnx"] = scratch / "model.onnx"
        if "int8" in kinds:
            calibration = None if images is None else (batch["pixel_values"].numpy() for batch in images.calibration)
            int8 = quantize_onnx(sources["onnx"], scratch / "int8.onnx", calibration)
            sources["int8"] = scratch / "int8.onnx"
    except Exception as error:
        # Exporters raise errors of many kinds; torch and sparse are measured all the same.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        failed = {name: reason for name in runtimes if RUNTIMES[name].source not in sources}
    paths = {name: sources[RUNTIMES[name].source] for name in runtimes if name not in failed}
    sizes |= {
        name: sum(file.stat().st_size for file in scratch.glob(f"{path.name}*"))
        for name, path in paths.items()
        if path != folder
    }
    return _Files(paths, sizes, failed, int8)


class _Turns:
    """Processes that take turns with one number of threads.

    Args:
        processes: by runtime; those that fail are taken out.
        files: what they load.
        example: images [n, channels, height, width], at least as many as the largest batch.
        rounds: turns of each.
        left_out: reasons by runtime, to which failures are added.
    """

    def __init__(
        self,
        processes: dict[str, RuntimeProcess],
        files: _Files,
        example: Images,
        rounds: int,
        left_out: dict[str, str],
    ):
        self.processes, self.files, self.example = processes, files, example
        self.rounds, self.left_out = rounds, left_out

    def measure(self, batch: int, threads: int) -> list[Latency]:
        """Measure every runtime with a batch size; a larger one than before, so that peaks of memory are its own."""
        loaded = self._of_each(lambda process: process.load(self.example[:batch]))
        self._refuse_other_logits({name: logits for name, (logits, _) in loaded.items()})
        seconds: dict[str, list[float]] = {name: [] for name in self.processes}
        for _ in range(self.rounds):
            for name, elapsed in self._of_each(RuntimeProcess.time).items():
                seconds[name].append(elapsed)
        return [
            Latency(name, batch, threads, tuple(seconds[name]), self.files.sizes[name], memory, note=loaded[name][1])
            for name, memory in self._of_each(RuntimeProcess.memory).items()
        ]

    def accuracies(self, images: LabelledImages) -> dict[str, float]:
        """Measure the accuracy in every runtime."""
        right, total = Counter[str](), 0
        for batch in images.batches:
            pixels, labels = batch["pixel_values"].numpy(), batch["labels"].numpy()
            found = self._of_each(functools.partial(RuntimeProcess.logits, images=pixels))
            right.update({name: int((logits.argmax(-1) == labels).sum()) for name, logits in found.items()})
            total += len(labels)
        return {name: right[name] / total for name in self.processes}

    def _refuse_other_logits(self, logits: Mapping[str, Images]) -> None:
        """Leave out runtimes that do not compute the same as torch; int8 never does."""
        expected = logits.get(REFERENCE)
        if expected is None:
            return
        for name in [name for name in logits if name != INT8]:
            difference = float(np.abs(logits[name] - expected).max())
            if not difference <= _TOLERANCE * max(1.0, float(np.abs(expected).max())):
                self._leave_out(name, f"its logits differ from those of torch by {difference:.2g}")

    def _of_each(self, ask: Callable[[RuntimeProcess], T]) -> dict[str, T]:
        """Ask every process in turn; those that fail are left out from then on."""
        answers: dict[str, T] = {}
        for name, process in list(self.processes.items()):
            try:
                answers[name] = ask(process)
            except RuntimeFailure as failure:
                self._leave_out(name, str(failure))
        return answers

    def _leave_out(self, name: str, reason: str) -> None:
        self.processes.pop(name).close()
        self.left_out[name] = reason
