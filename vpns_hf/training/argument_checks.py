"""Check the arguments of training, each alone, before transformers sees them."""

from __future__ import annotations

import json
from typing import Any

from transformers import SchedulerType, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

from ..metrics import METRICS
from ..scores.starts import AUTO, SCORE_STARTS
from ..values import (
    ABOVE_0,
    AT_LEAST_0,
    FLAG,
    FRACTION,
    NAME,
    PATH,
    SEED,
    Check,
    check_fields,
    count,
    either,
    instance_of,
    is_count,
    list_of,
    number,
    one_of,
    optional,
)
from .optimizers import NOT_IN_TRAINER

PROMPT_MIXINGS = ("alternate", "always", "never")
EVAL_PROMPTS = ("without", "with", "both")
_BELOW_1 = number("a number of at least 0 and below 1", lambda value: 0 <= value < 1)
_EPOCHS = number("a number of epochs from 0 to 1000000", lambda value: 0 <= value <= 1e6)
_STEPS = Check(
    "a number of optimizer steps of at least 1, or -1, which is no limit", lambda value: is_count(value) or value == -1
)
_INTERVAL = number(
    "a whole number of steps of at least 1, or a share of them below 1",
    lambda value: 0 < value < 1 or (value >= 1 and value % 1 == 0),
)
_OPTIMIZER = one_of([*NOT_IN_TRAINER, *(name.value for name in OptimizerNames)])._replace(
    expected="the name of an optimizer, such as sgd, adam or adamw_torch (`transformers.training_args.OptimizerNames`)"
)
_SCHEDULE = one_of([name.value for name in SchedulerType])
_REPORTERS = one_of(["none", "all", *INTEGRATION_TO_CALLBACK])


def _is_json(text: Any) -> bool:
    try:
        return isinstance(text, str) and isinstance(json.loads(text), dict)
    except ValueError:
        return False


_DICTIONARY = optional(Check("a dictionary, or one as JSON", lambda value: isinstance(value, dict) or _is_json(value)))
_INTERVALS = one_of([name.value for name in IntervalStrategy])

# Where the type of a field says too little.
CHECKS: dict[str, Check] = {
    "output_dir": optional(PATH),
    "resume_from_checkpoint": optional(either(PATH, FLAG)),
    "per_device_train_batch_size": count(),
    "per_device_eval_batch_size": count(),
    "gradient_accumulation_steps": count(),
    "eval_accumulation_steps": optional(count()),
    "torch_empty_cache_steps": optional(count()),
    "num_train_epochs": _EPOCHS,
    "search_epochs": _EPOCHS,
    "head_warm_up_epochs": _EPOCHS,
    "max_steps": _STEPS,
    "search_max_steps": _STEPS,
    "total_max_steps": _STEPS,
    "warmup_steps": AT_LEAST_0,
    "eval_delay": AT_LEAST_0,
    "logging_steps": _INTERVAL,
    "eval_steps": optional(_INTERVAL),
    "save_steps": _INTERVAL,
    "save_total_limit": optional(count()),
    "logging_strategy": _INTERVALS,
    "eval_strategy": _INTERVALS,
    "save_strategy": one_of([name.value for name in SaveStrategy]),
    "hub_strategy": one_of([name.value for name in HubStrategy]),
    "report_to": optional(either(_REPORTERS, list_of(_REPORTERS, "loggers"))),
    "seed": SEED,
    "data_seed": optional(SEED),
    "dataloader_num_workers": count(0, 1024),
    "dataloader_prefetch_factor": optional(count()),
    "optim": _OPTIMIZER,
    "score_optim": either(_OPTIMIZER, one_of(["platon"])),
    "lr_scheduler_type": _SCHEDULE,
    "score_lr_scheduler_type": optional(_SCHEDULE),
    "learning_rate": AT_LEAST_0,
    "head_learning_rate": optional(AT_LEAST_0),
    "prompt_learning_rate": AT_LEAST_0,
    "search_prompt_learning_rate": AT_LEAST_0,
    "score_learning_rate": optional(either(AT_LEAST_0, one_of([AUTO]))),
    "score_travel": optional(ABOVE_0),
    "score_start": optional(one_of(list(SCORE_STARTS))),
    "lr_scheduler_kwargs": _DICTIONARY,
    "gradient_checkpointing_kwargs": _DICTIONARY,
    "activation_checkpointing_kwargs": _DICTIONARY,
    "momentum": _BELOW_1,
    "adam_beta1": _BELOW_1,
    "adam_beta2": _BELOW_1,
    "adam_epsilon": AT_LEAST_0,
    "weight_decay": AT_LEAST_0,
    "max_grad_norm": AT_LEAST_0,
    "label_smoothing_factor": _BELOW_1,
    "mixup_alpha": AT_LEAST_0,
    "cutmix_alpha": AT_LEAST_0,
    "method": NAME,
    "sparsity": optional(FRACTION),
    "teacher": optional(NAME),
    "teacher_weight": number("a share in [0, 1], such as 0.5", lambda value: 0 <= value <= 1),
    "teacher_temperature": ABOVE_0,
    "calibration_images_per_class": count(),
    "consistency_check_steps": count(0),
    "prompt_mixing": one_of(PROMPT_MIXINGS),
    "eval_prompt": one_of(EVAL_PROMPTS),
    "metrics": optional(list_of(one_of(list(METRICS)), f"names out of {', '.join(METRICS)}")),
    # transformers takes more than its types say.
    "accelerator_config": instance_of(object),
    "deepspeed": instance_of(object),
    "fsdp": instance_of(object),
    "debug": instance_of(object),
    "parallelism_config": instance_of(object),
    "trackio_static_space_id": instance_of(object),
}


def check_single(args: TrainingArguments) -> None:
    """Refuse the first argument that has a value of the wrong kind.

    Raises:
        ValueError: what it is and what was expected, in one sentence.
    """
    check_fields(args, CHECKS)
