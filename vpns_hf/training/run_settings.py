"""Describe what determines the results of a run, to refuse resuming it under other settings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from ..data.splits import SplitView
from ..model.modeling import PromptedSparseModel
from .arguments import VPNsTrainingArguments
from .consistency import hash_tensors
from .reporting import loggable
from .trainer_arguments import HONOURED

# Arguments that change neither weights, masks nor the choice of the best model.
_FREE = frozenset(
    {
        *("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size"),
        *("average_tokens_across_devices", "dataloader_in_order", "dataloader_multiprocessing_context"),
        *("dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory"),
        *("dataloader_prefetch_factor", "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb"),
        *("ddp_find_unused_parameters", "ddp_static_graph", "ddp_timeout", "debug", "deepspeed", "disable_tqdm"),
        *("accelerator_config", "eval_accumulation_steps", "eval_delay", "eval_on_start", "eval_steps"),
        *("eval_strategy", "eval_use_gather_object", "fsdp", "fsdp_config", "full_determinism", "ignore_data_skip"),
        *("activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing"),
        *("gradient_checkpointing_kwargs", "hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision"),
        *("hub_strategy", "hub_token", "include_for_metrics", "log_level", "log_level_replica", "log_on_each_node"),
        *("logging_first_step", "logging_steps", "logging_strategy", "prediction_loss_only", "project"),
        *("push_to_hub", "remove_unused_columns", "report_to", "run_name", "save_on_each_node", "save_steps"),
        *("save_strategy", "save_total_limit", "skip_memory_metrics", "torch_empty_cache_steps"),
        *("trackio_bucket_id", "trackio_space_id", "trackio_static_space_id", "use_cpu"),
        *("consistency_check_steps", "metrics"),
    }
)
# Fields of the model's configuration that a run changes itself, or that are compared by their own name.
_CHANGED_BY_RUNS = frozenset(
    {
        *(
            "state",
            "sparsity",
            "scope",
            "pattern",
            "signed_scores",
            "mapped_labels",
            "label_mapping_state",
            "use_prompt",
        ),
        *("transformers_version", "dtype", "id2label", "label2id", "backbone_config"),
    }
)


def run_settings(
    args: VPNsTrainingArguments, model: PromptedSparseModel, sparsity: float, scope: str, dataset: Any
) -> dict[str, Any]:
    """Return what a resumed run must have in common with the run that it resumes, as JSON values.

    Args:
        args: arguments of the run.
        model: the model before training.
        sparsity: sparsity asked for, a fraction.
        scope: the model's scope.
        dataset: training images as prompted batches show them; None if nothing will be trained.
    """
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    names = {field.name for field in dataclasses.fields(args)} - (inherited - HONOURED) - _FREE
    settings = {name: loggable(vars(args)[name]) for name in sorted(names)}
    config = {name: value for name, value in model.config.to_dict().items() if name not in _CHANGED_BY_RUNS}
    weights = model.parameters_by_role()["weights"].values()
    return settings | {
        "sparsity": sparsity,
        "scope": scope,
        "pattern": model.config.pattern,
        "images per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "model configuration": _digest(json.dumps(loggable(config), sort_keys=True)),
        "pretrained weights": f"{int(hash_tensors(weights, model.device)):x}",
        "training data": dataset.content_digest() if isinstance(dataset, SplitView) else len(dataset or ()),
    }


def check_settings(folder: Any, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise if a run was started with other settings than those it would be resumed with.

    Settings that an earlier version did not record are not compared.

    Raises:
        ValueError: names the first settings that differ.
    """
    differing = [name for name, value in settings.items() if name in saved and saved[name] != value]
    if not differing:
        return
    shown = ", ".join(f"{name} {_shown(saved[name])} instead of {_shown(settings[name])}" for name in differing[:5])
    more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    raise ValueError(
        f"{folder} holds a run with {shown}{more}; resume it with the settings that it was started with, or choose "
        "another `output_dir`."
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
