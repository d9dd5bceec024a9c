"""Say of every argument of transformers' Trainer whether it is honoured, refused or without effect.

A test compares the tables with the installed transformers, so that a new argument is noticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from ..values import instance_of, require


@dataclass(frozen=True)
class Refused:
    """An argument that would be ignored or would make results wrong.

    Args:
        allowed: values that are accepted.
        reason: end of the sentence that refuses another value: why, and the way out.
    """

    allowed: tuple[Any, ...]
    reason: str


_FROM_ALL_PREDICTIONS = "metrics without and with the prompt are computed from all predictions at once; leave it out"

REFUSED: dict[str, Refused] = {
    "auto_find_batch_size": Refused(
        (False,), "the stages are planned before training; set `per_device_train_batch_size`"
    ),
    "batch_eval_metrics": Refused((False,), _FROM_ALL_PREDICTIONS),
    "bf16_full_eval": Refused((False,), "it would leave the weights in 16 bits for the next stage; use `bf16=True`"),
    "enable_jit_checkpoint": Refused(
        (False,),
        "it saves in the middle of a step; leave it out, because VPNsTrainer saves a checkpoint at SIGTERM and Ctrl-C "
        "by itself, after the step",
    ),
    "eval_do_concat_batches": Refused((True,), _FROM_ALL_PREDICTIONS),
    "fp16_full_eval": Refused((False,), "it would leave the weights in 16 bits for the next stage; use `fp16=True`"),
    "include_num_input_tokens_seen": Refused(("no", False), "images have no tokens to count; leave it out"),
    "label_names": Refused((None, ["labels"]), "labels are called `labels`; let the data collator rename yours"),
    "neftune_noise_alpha": Refused((None,), "its noise is for embeddings of text; leave it out"),
    "optim_target_modules": Refused((None,), "roles have one optimizer each; choose `optim` without it"),
    "parallelism_config": Refused((None,), "masks are not sharded that way; use DDP or FSDP2"),
    "restore_callback_states_from_checkpoint": Refused(
        (True,), "a resumed run would lose its counts of images and time; leave it out"
    ),
    "save_only_model": Refused((False,), "such checkpoints cannot be resumed; leave it out"),
    "train_sampling_strategy": Refused(
        ("random", "sequential"), "images have no length to group by; use 'random' or 'sequential'"
    ),
    "use_liger_kernel": Refused((False,), "its kernels are for language models; leave it out"),
}

WITHOUT_EFFECT: dict[str, str] = {
    "do_eval": "a switch for scripts",
    "do_predict": "a switch for scripts",
    "do_train": "a switch for scripts",
    "length_column_name": "for `group_by_length`, which is refused",
    "liger_kernel_config": "for `use_liger_kernel`, which is refused",
    "local_rank": "set by the launcher",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "resume_from_checkpoint": "recipes pass it to `train()`, which takes the argument of that name",
    "use_cache": "image classifiers cache nothing",
}

HONOURED: frozenset[str] = frozenset(
    {
        *("accelerator_config", "activation_checkpointing", "activation_checkpointing_kwargs", "adam_beta1"),
        *("adam_beta2", "adam_epsilon", "average_tokens_across_devices", "bf16", "data_seed"),
        *("dataloader_drop_last", "dataloader_in_order", "dataloader_multiprocessing_context"),
        *("dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory"),
        *("dataloader_prefetch_factor", "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb"),
        *("ddp_find_unused_parameters", "ddp_static_graph", "ddp_timeout", "debug", "deepspeed", "disable_tqdm"),
        *("eval_accumulation_steps", "eval_delay", "eval_on_start", "eval_steps", "eval_strategy"),
        *("eval_use_gather_object", "fp16", "fsdp", "fsdp_config", "full_determinism"),
        *("gradient_accumulation_steps", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
        *("greater_is_better", "hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy"),
        *("hub_token", "ignore_data_skip", "include_for_metrics", "label_smoothing_factor", "learning_rate"),
        *("load_best_model_at_end", "log_level", "log_level_replica", "log_on_each_node", "logging_first_step"),
        *("logging_steps", "logging_strategy", "lr_scheduler_kwargs", "lr_scheduler_type", "max_grad_norm"),
        *("max_steps", "metric_for_best_model", "num_train_epochs", "optim", "optim_args", "output_dir"),
        *("per_device_eval_batch_size", "per_device_train_batch_size", "prediction_loss_only", "project"),
        *("push_to_hub", "remove_unused_columns", "report_to", "run_name", "save_on_each_node", "save_steps"),
        *("save_strategy", "save_total_limit", "seed", "skip_memory_metrics", "tf32", "torch_compile"),
        *("torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "trackio_bucket_id"),
        *("trackio_space_id", "trackio_static_space_id", "use_cpu", "warmup_steps", "weight_decay"),
    }
)

# Arguments of `Trainer.__init__` that VPNsTrainer refuses, with the reason.
REFUSED_OBJECTS: dict[str, str] = {
    "model_init": "every stage starts from the model of the one before; pass a `model`",
    "optimizers": (
        "every stage builds one optimizer per role; choose them by `optim`, `score_optim`, `learning_rate` and "
        "`lr_scheduler_type`, or override `create_optimizer`"
    ),
    "optimizer_cls_and_kwargs": (
        "every stage builds one optimizer per role; choose them by `optim`, `score_optim` and `optim_args`, or "
        "override `create_optimizer`"
    ),
}
HONOURED_OBJECTS = frozenset(
    {
        *("model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class", "compute_loss_func"),
        *("compute_metrics", "callbacks", "preprocess_logits_for_metrics"),
    }
)


def check_arguments(args: TrainingArguments) -> None:
    """Raise if an argument is given that cannot be honoured.

    Raises:
        ValueError: names the argument, the reason and the way out.
    """
    for name, refused in REFUSED.items():
        if (value := vars(args)[name]) not in refused.allowed:
            raise ValueError(f"`{name}={value!r}` is not supported: {refused.reason}.")


def check_objects(given: Mapping[str, Any]) -> None:
    """Raise if `Trainer.__init__` is given an object that cannot be honoured.

    Raises:
        ValueError: names the argument, the reason and the way out.
    """
    require("args", given["args"], instance_of(TrainingArguments))
    for name, reason in REFUSED_OBJECTS.items():
        if given.get(name) not in (None, (None, None)):
            raise ValueError(f"VPNsTrainer does not take `{name}`: {reason}.")
