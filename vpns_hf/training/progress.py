"""Show the progress of a stage: one bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import has_length

from ..values import is_number

# Names in the logs by how they are shown.
_SHARES = {"eval_accuracy": "accuracy", "eval_accuracy_prompted": "accuracy prompted"}


class StageBars(ProgressCallback):
    """Show step, loss, accuracy and density of a stage.

    In a terminal this is one bar a stage, and below it one for an evaluation; elsewhere, or with
    `args.disable_tqdm`, a line for every log. The main process alone shows it, and none at a log level above warnings.

    Args:
        place: function that names the present stage, such as `"[stage 2 of 3] search"`.
    """

    training_bar: tqdm | None
    prediction_bar: tqdm | None

    def __init__(self, place: Callable[[], str]):
        super().__init__()
        self.place = place
        self._facts: dict[str, str] = {}
        self._is_training = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        self._close()
        self._facts, self._is_training = {}, True
        if _has_bars(args, state):
            self.training_bar = _bar(self.place(), state.max_steps, initial=state.global_step, unit="step")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        if self.training_bar is not None:
            self.training_bar.update(state.global_step - self.training_bar.n)

    def on_prediction_step(  # noqa: D102
        self, args: Any, state: TrainerState, control: TrainerControl, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if not _has_bars(args, state) or not has_length(eval_dataloader):
            return
        if self.prediction_bar is None:
            self.prediction_bar = _bar("evaluation", len(eval_dataloader), leave=False)
        if self.prediction_bar.n == self.prediction_bar.total:
            # A second pass, with the prompt.
            self.prediction_bar.reset()
        self.prediction_bar.update()

    def on_log(  # noqa: D102
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        facts = _facts(logs or {})
        # What a finished stage evaluates is in the line that the trainer prints of it.
        if not facts or not self._is_training or not _is_shown(args, state):
            return
        self._facts |= facts
        if self.training_bar is not None:
            self.training_bar.set_postfix_str(_in_words(self._facts))
        else:
            print(f"{self.place()}: step {state.global_step}/{state.max_steps}, {_in_words(facts)}", flush=True)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        self._close()

    def _close(self) -> None:
        self._is_training = False
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None


def replace_progress(trainer: Trainer, place: Callable[[], str]) -> None:
    """Show the progress of stages instead of Trainer's own bar or dictionaries; other callbacks stay.

    Args:
        trainer: a trainer to which no callback was added since it was built.
        place: as in [`StageBars`].
    """
    kind = PrinterCallback if trainer.args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK
    # The last one is Trainer's own; one before it is the caller's.
    own = [callback for callback in trainer.callback_handler.callbacks if type(callback) is kind][-1]
    trainer.remove_callback(own)
    trainer.add_callback(StageBars(place))


def _is_shown(args: TrainingArguments, state: TrainerState) -> bool:
    return state.is_world_process_zero and args.get_process_log_level() <= logging.WARNING


def _has_bars(args: TrainingArguments, state: TrainerState) -> bool:
    return _is_shown(args, state) and not args.disable_tqdm and sys.stderr.isatty()


def _bar(name: str, total: int, **options: Any) -> tqdm:
    return tqdm(desc=name, total=total, file=sys.stderr, dynamic_ncols=True, **options)


def _facts(logs: Mapping[str, Any]) -> dict[str, str]:
    """Choose from a log, as text, what is shown of it."""
    facts = {"loss": f"{logs['loss']:.4g}"} if "loss" in logs else {}
    # A caller's own metrics may be of any kind.
    facts |= {words: f"{logs[name]:.2%}" for name, words in _SHARES.items() if is_number(logs.get(name))}
    return facts | ({"density": f"{1 - logs['sparsity']:.2%}"} if "sparsity" in logs else {})


def _in_words(facts: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
