"""Handle Ctrl-C and SIGTERM as requests to save a checkpoint and leave."""

from __future__ import annotations

import os
import signal
import threading
from functools import partial
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


def protect_workers(loader: DataLoader) -> None:
    """Let the workers of a loader ignore Ctrl-C and SIGTERM, which go to the whole process group.

    The trainer alone heeds them.

    Args:
        loader: a loader of torch or accelerate; one that Trainer built has no argument for this.
    """
    # accelerate wraps the loader that starts the workers.
    inner = loader.base_dataloader if isinstance(loader, DataLoaderAdapter) else loader
    inner.worker_init_fn = _ignore_signals
    # A worker begins with the handlers of this process, so that one that has just started could end by a signal.
    inner._get_iterator = partial(_start_with_blocked_signals, inner)  # type: ignore[method-assign]


def _start_with_blocked_signals(loader: DataLoader) -> Any:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return type(loader)._get_iterator(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_signals(worker_id: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
