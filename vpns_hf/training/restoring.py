"""Save the model of a finished stage and the state that stages rewind to, and restore a model."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..model.modeling import PromptedSparseModel
from ..saved_folder import writing
from .checkpoints import publish_folder
from .plan import StagePlan
from .run_record import MODEL_FOLDER


def save_first_state(model: PromptedSparseModel, path: Path) -> None:
    """Save the backbone's parameters and buffers atomically, for stages that rewind to them.

    Raises:
        OSError: they cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    state = model.backbone_state()
    with writing(f"The state that stages rewind to, {path},", temporary, "; make room and start again"):
        save_file({name: tensor.detach().clone() for name, tensor in state.items()}, temporary)
        os.replace(temporary, path)


def save_stage(model: PromptedSparseModel, state: TrainerState, plan: StagePlan) -> None:
    """Save model and log of a finished stage.

    Raises:
        OSError: they cannot be written; the checkpoints of the stage are untouched.
    """
    temporary, final = plan.folder / f"{MODEL_FOLDER}.tmp", plan.folder / MODEL_FOLDER
    advice = "; its checkpoints are as they were, so make room and pass `resume_from_checkpoint=True`"
    with writing(f"The model of the stage {plan.name}, {final},", temporary, advice):
        model.save_pretrained(temporary, packed=False)
        state.save_to_json(str(plan.folder / TRAINER_STATE_NAME))
        publish_folder(temporary, final)


def replace_model(model: PromptedSparseModel, folder: Path) -> None:
    """Replace a model in place by a saved one, on the device and in the memory format of the model."""
    loaded = type(model).from_pretrained(folder)
    # Copied, because tensors that are mapped from the file lie at other addresses, where kernels may sum in another
    # order.
    model.replace_with(copy.deepcopy(loaded).to(model.device, memory_format=_memory_format(model)))


def _memory_format(model: PromptedSparseModel) -> torch.memory_format:
    """channels_last where the model is in it; else the one that each tensor has."""
    is_last = any(
        weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
        for weight in model.prunable_weights().values()
    )
    return torch.channels_last if is_last else torch.preserve_format
