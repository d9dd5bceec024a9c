"""Handle Ctrl-C and SIGTERM as requests to save a checkpoint and leave."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, NoReturn

from accelerate.data_loader import DataLoaderAdapter
from torch.utils.data import DataLoader

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Record Ctrl-C and SIGTERM inside a `with` block instead of ending the process; a second Ctrl-C ends it at once.

    A repeated SIGTERM is not taken for impatience: some job schedulers send it twice.

    Args:
        announces: whether this process reports a signal on stderr.

    Attributes:
        received: the signal that came first since the context was last entered, or None.
    """

    def __init__(self, announces: bool = True):
        self.announces = announces
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self.received = None
        # Python takes signals in the main thread alone; and what a process was started to ignore stays ignored.
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._receive) for number in heeded}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.received = signal.Signals(number)
        if self.announces:
            # A print could interrupt another one, which Python forbids.
            os.write(2, f"\n{self.received.name}: saving after this step; Ctrl-C leaves at once.\n".encode())


def leave(received: signal.Signals) -> NoReturn:
    """End as the signal would have: Ctrl-C by KeyboardInterrupt, anything else with exit code 128 + its number.

    Raises:
        KeyboardInterrupt, SystemExit: always one of them.
    """
    if received is signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + received)


def ignore_signals(worker_id: int) -> None:
    """Ignore Ctrl-C and SIGTERM in a data-loader worker: they go to the whole process group, and the trainer stops."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def protect_workers(loader: DataLoader) -> None:
    """Let the workers of a loader that Trainer built ignore Ctrl-C and SIGTERM, which Trainer has no argument for."""
    # accelerate wraps the loader that starts the workers.
    inner = loader.base_dataloader if isinstance(loader, DataLoaderAdapter) else loader
    inner.worker_init_fn = ignore_signals
