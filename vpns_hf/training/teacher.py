"""Learn from a teacher: a trained model whose predictions a run follows (knowledge distillation, arXiv 1503.02531)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig

from ..methods.stage import Method, Stage
from ..methods.table import with_teacher
from ..model.configuration import PromptedSparseConfig
from ..model.modeling import PromptedSparseModel
from .arguments import SELF, VPNsTrainingArguments
from .checks import check_teacher
from .run_record import RunRecord


@dataclass(frozen=True)
class Teacher:
    """Model that a stage learns from.

    Args:
        model: model in evaluation mode, without gradients.
        weight: share of the loss that compares with the teacher, in [0, 1].
        temperature: temperature of [`distillation_loss`].
    """

    model: PromptedSparseModel
    weight: float
    temperature: float

    def mixed_loss(self, loss: Tensor, logits: Tensor, pixel_values: Tensor) -> Tensor:
        """Compute `(1 - weight) * loss + weight * distillation_loss`.

        The teacher predicts as it was saved, with its prompt only where `config.use_prompt` says so.

        Args:
            loss: loss of the labels, a scalar.
            logits: logits of the student, [n, classes].
            pixel_values: images of the batch, [n, channels, height, width], normalised.
        """
        with torch.no_grad():
            targets = self.model(pixel_values).logits
        return (1 - self.weight) * loss + self.weight * distillation_loss(logits, targets, self.temperature)


class Teaching:
    """Teacher of a run: none, a model that is loaded, or the dense reference that the run tunes first.

    Args:
        args: arguments of the run, whose `teacher` wins over the method's.
        method: pruning method.
        student: model that learns.
        loss_func: `compute_loss_func`, a loss in place of the model's own, if any.

    Raises:
        ValueError: the run cannot learn from that teacher.
        OSError: there is no such model.
    """

    def __init__(self, args: VPNsTrainingArguments, method: Method, student: PromptedSparseModel, loss_func: Any):
        self.args, self.name = args, args.teacher or method.teacher
        self._named: PromptedSparseModel | None = None
        if self.name is None:
            return
        check_teacher(self.name, method, args, student, loss_func)
        if self.name != SELF:
            self._named = load_teacher(self.name, student).to(args.device)

    def stages(self, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        """Return the stages of the run, one that tunes the dense reference included."""
        has_own = any(stage.length == "teacher" for stage in stages)
        return with_teacher(stages) if self.name == SELF and not has_own else stages

    def teacher_of(self, stage: Stage, load_stage: Callable[[str], PromptedSparseModel]) -> Teacher | None:
        """Return the teacher of a stage; None where it learns from labels alone.

        Args:
            stage: stage that begins.
            load_stage: function that loads the model of a finished stage by name.
        """
        if self.name is None or stage.length in ("warm_up", "teacher") or not stage.roles:
            return None
        model = self._named if self._named is not None else _at_rest(load_stage("teacher"))
        return Teacher(model, self.args.teacher_weight, self.args.teacher_temperature)


def load_teacher(name: str, student: PromptedSparseModel) -> PromptedSparseModel:
    """Load a teacher, in evaluation mode and without gradients.

    Args:
        name: folder of a run, whose last finished stage is taken, or folder or Hub id of an image classifier.
        student: model that will learn from it.

    Raises:
        ValueError: it takes other images or has other classes than the student.
        OSError: there is no such model.
    """
    last = RunRecord.last_model(Path(name))
    source = name if last is None else str(last)
    if _is_prompted_sparse(source):
        teacher: PromptedSparseModel = PromptedSparseModel.from_pretrained(source)
    else:
        teacher = PromptedSparseModel.from_backbone(source, prompt=None, image_size=student.config.image_size)
        teacher.detach_scores()
    _check_fit(name, teacher.config, student.config)
    return _at_rest(teacher)


def _is_prompted_sparse(source: str) -> bool:
    try:
        return isinstance(AutoConfig.from_pretrained(source), PromptedSparseConfig)
    except (OSError, ValueError):
        # Loading it as a backbone says in one sentence what is wrong.
        return False


def _at_rest(model: PromptedSparseModel) -> PromptedSparseModel:
    model.requires_grad_(False)
    return model.eval()


def _check_fit(name: str, teacher: PromptedSparseConfig, student: PromptedSparseConfig) -> None:
    names_differ = _has_names(teacher) and _has_names(student) and teacher.id2label != student.id2label
    if teacher.num_labels != student.num_labels or names_differ:
        raise ValueError(
            f"The teacher {name} has {teacher.num_labels} classes ({teacher.id2label[0]}, ...), and the model that "
            f"learns has {student.num_labels} ({student.id2label[0]}, ...); pass a teacher that was trained on this "
            "task."
        )
    ours, theirs = _images(student), _images(teacher)
    if ours != theirs:
        raise ValueError(
            f"The teacher {name} takes images of size, mean and std {theirs}, and the model that learns {ours}; both "
            "see the same batches, so pass a teacher of the same images, with its image processor in its folder."
        )


def _has_names(config: PromptedSparseConfig) -> bool:
    return any(name != f"LABEL_{index}" for index, name in config.id2label.items())


def _images(config: PromptedSparseConfig) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(values or ()) for values in (config.image_size, config.image_mean, config.image_std))


def distillation_loss(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Compute `T^2 * KL(softmax(targets / T) || softmax(logits / T))`, the mean over the batch.

    Args:
        logits: logits of the student, [n, classes].
        targets: logits of the teacher, [n, classes].
        temperature: T. The factor T^2 keeps the size of the gradient where T changes.
    """
    student, teacher = (F.log_softmax(values.float() / temperature, -1) for values in (logits, targets))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
