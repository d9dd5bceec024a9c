"""A process for each runtime, which loads a model and runs it when it has its turn."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..inference import resident_bytes
from .runtimes import RUNTIMES, Images, Loaded


class RuntimeFailure(Exception):
    """A runtime cannot run a model; the message is the reason."""


def _context() -> ForkServerContext | SpawnContext:
    """Processes that share no memory with this one; on Linux they come from one that has imported the package."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class RuntimeProcess:
    """A process of its own with a model in one runtime, which waits for its turn.

    Args:
        runtime: key of `RUNTIMES`.
        source: what the runtime loads.
        threads: threads that it computes with.
    """

    def __init__(self, runtime: str, source: Path, threads: int):
        context = _context()
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, runtime, source, threads), daemon=True)
        self._process.start()
        other.close()

    def load(self, example: Images) -> tuple[Images, str | None]:
        """Load the model for images like the example, and return its logits and the runtime's note."""
        return self._ask("load", example)

    def time(self) -> float:
        """Run the example twice, and return the seconds of the second run."""
        return self._ask("time", None)

    def logits(self, images: Images) -> Images:
        """Compute logits [n, classes] of images [n, channels, height, width]."""
        return self._ask("logits", images)

    def memory(self) -> int | None:
        """Return the bytes by which resident memory has grown at most since the runtime was imported."""
        return self._ask("memory", None)

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(10)
        self._process.kill()
        self._process.join()

    def _ask(self, request: str, argument: Any) -> Any:
        try:
            self._connection.send((request, argument))
            failure, answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            raise RuntimeFailure(f"its process ended with exit code {self._process.exitcode}") from None
        if failure is not None:
            raise RuntimeFailure(failure)
        return answer


@contextmanager
def runtime_processes(sources: dict[str, Path], threads: int) -> Iterator[dict[str, RuntimeProcess]]:
    """Start a process for each runtime, and end them after the `with` block.

    Args:
        sources: what each runtime loads.
        threads: threads that each computes with.
    """
    processes = {runtime: RuntimeProcess(runtime, source, threads) for runtime, source in sources.items()}
    try:
        yield processes
    finally:
        for process in processes.values():
            process.close()


class _Server:
    """Answers the requests of a [`RuntimeProcess`]."""

    def __init__(self, runtime: str, source: Path, threads: int):
        self.runtime, self.source, self.threads = RUNTIMES[runtime], source, threads
        import_module(self.runtime.package)
        self.before = resident_bytes("VmRSS")
        self.loaded: Loaded
        self.example: Images

    def load(self, example: Images) -> tuple[Images, str | None]:
        self.example, self.loaded = example, self.runtime.load(self.source, self.threads, example)
        return self.loaded.run(example), self.loaded.note

    def time(self, _: None) -> float:
        # Another process has had the caches since the last turn.
        self.loaded.run(self.example)
        start = time.perf_counter()
        self.loaded.run(self.example)
        return time.perf_counter() - start

    def logits(self, images: Images) -> Images:
        return self.loaded.run(images)

    def memory(self, _: None) -> int | None:
        peak = resident_bytes("VmHWM")
        return None if peak is None or self.before is None else peak - self.before


def _serve(connection: Connection, runtime: str, source: Path, threads: int) -> None:
    logging.disable_progress_bar()
    server = _Server(runtime, source, threads)
    answers: dict[str, Callable[[Any], Any]] = {
        "load": server.load,
        "time": server.time,
        "logits": server.logits,
        "memory": server.memory,
    }
    while True:
        try:
            request, argument = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            connection.send((None, answers[request](argument)))
        except Exception as error:
            # One line: whatever a runtime raises becomes the reason that it is left out.
            connection.send((" ".join(f"{type(error).__name__}: {error}".split())[:300], None))
