"""Count the cost of a stage: images, passes and time."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from ..model.modeling import PromptedSparseModel


@dataclass(frozen=True)
class Cost:
    """Cost of a stage, evaluation aside.

    Args:
        images: training images seen, on all processes.
        forward_images, backward_images: images that went forward and backward through the backbone to train or score.
        seconds: time of the training steps and the preparations.
        trained_weights: parameters that were trained, pruned ones not counted.
        teacher_images: images that went forward through a teacher.
    """

    images: int = 0
    forward_images: int = 0
    backward_images: int = 0
    seconds: float = 0.0
    trained_weights: int = 0
    teacher_images: int = 0


@dataclass(eq=False)
class Counters(TrainerCallback, ExportableState):
    """Count the cost of a stage, and save the counts in its checkpoints.

    Args:
        flips: mask entries that changed since the last log.
        images, forward_images, backward_images, teacher_images, seconds: as in [`Cost`].
        logged_step: the step of the last log.
        logged_loss: sum of the losses up to that step.
        loss: sum of the losses after it.
        score_learning_rate: learning rate of the scores that was found when the stage began; 0 where none was.
    """

    flips: int = 0
    images: int = 0
    forward_images: int = 0
    backward_images: int = 0
    teacher_images: int = 0
    seconds: float = 0.0
    logged_step: int = 0
    logged_loss: float = 0.0
    loss: float = 0.0
    score_learning_rate: float = 0.0

    def __post_init__(self) -> None:
        self._started = 0.0

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        self.seconds += time.perf_counter() - self._started

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint saves."""
        return {"args": asdict(self), "attributes": {}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the counts of a checkpoint."""
        self.__dict__.update(state)

    def reset(self) -> None:
        """Reset all counts."""
        self.__dict__ = dict(vars(Counters()))

    def cost(self, trained_weights: int) -> Cost:
        """Return the cost of the stage."""
        return Cost(
            self.images,
            self.forward_images,
            self.backward_images,
            self.seconds,
            trained_weights,
            self.teacher_images,
        )

    def count_batch(self, images: int) -> None:
        """Count images that training takes forward and backward."""
        self.images += images
        self.forward_images += images
        self.backward_images += images

    def take_flips(self) -> int:
        """Return the changed mask entries since the last call."""
        flips, self.flips = self.flips, 0
        return flips

    @contextmanager
    def measuring(self, model: PromptedSparseModel) -> Iterator[None]:
        """Count time and passes of a model, and of copies made of it, inside a `with` block."""

        def count(module: Any, args: Any, output: Any) -> None:
            images = len(output.logits)
            self.forward_images += images
            if output.logits.requires_grad:
                output.logits.register_hook(lambda gradient: self._count_backward(images))

        handle, started = model.backbone.register_forward_hook(count), time.perf_counter()
        try:
            yield
        finally:
            handle.remove()
            self.seconds += time.perf_counter() - started

    def _count_backward(self, images: int) -> None:
        self.backward_images += images


def trained_weights(model: PromptedSparseModel, roles: Collection[str]) -> int:
    """Return the number of parameters that stages with these roles train, without the pruned ones."""
    by_role = model.parameters_by_role()
    trained = sum(parameter.numel() for role in roles for parameter in by_role[role].values())
    if "weights" in roles:
        trained -= sum(int((~mask).sum()) for mask in model.masks().values())
    return trained
