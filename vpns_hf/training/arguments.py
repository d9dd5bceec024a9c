"""`VPNsTrainingArguments`: the arguments of Trainer, the search and the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..methods.stage import Method, RoleSettings, Stage
from ..methods.table import get_method
from ..scores.starts import AUTO, ScoreSettings
from .argument_checks import check_single
from .optimizers import NOT_IN_TRAINER, PLATON
from .trainer_arguments import check_arguments

SELF = "self"
"""Name of the teacher that is the dense reference of the run itself: same seed, steps and batches, nothing pruned."""


@dataclass
class VPNsTrainingArguments(TrainingArguments):
    """Set the arguments of [`VPNsTrainer`]: all of [`~transformers.TrainingArguments`], and those below.

    The former apply to the tune stage and, where nothing else is said, to every stage. `max_steps` bounds every stage;
    `load_best_model_at_end` applies to the last stage alone.

    Defaults that differ from Trainer's: SGD with momentum, cosine schedule, weight decay 1e-4, no gradient clipping
    (it would couple the norms of prompt and scores), `remove_unused_columns=False`.
    """

    method: str = field(
        default="vpns_joint",
        metadata={"help": "Pruning method: vpns_joint, vpns (the paper's), hydra, omp, ... or <method>+prompt."},
    )
    sparsity: float | None = field(
        default=None, metadata={"help": "Fraction of prunable weights to remove; the model's own when not given."}
    )
    search_epochs: float = field(
        default=30.0,
        metadata={
            "help": "Epochs of the search. With prompt_mixing=alternate an epoch shows every image twice: prompted "
            "and plain."
        },
    )
    search_max_steps: int = field(
        default=-1, metadata={"help": "Optimizer steps of the search; replaces max_steps and search_epochs."}
    )
    head_warm_up_epochs: float = field(
        default=1.0, metadata={"help": "Epochs that train a new head alone, before the search."}
    )
    num_train_epochs: float = field(default=30.0, metadata={"help": "Epochs of the tune stage."})
    mix_unaugmented: bool = field(
        default=False,
        metadata={
            "help": "Show methods without a prompt the batches that VPNs sees: in turn unaugmented and augmented."
        },
    )
    total_max_steps: int = field(
        default=-1,
        metadata={
            "help": "Optimizer steps of all stages after the warm-up together, shared out equally; replaces all other "
            "lengths of stages."
        },
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Model whose predictions are learned from: the folder of a run, a folder or Hub id, or self (the "
            "dense reference of the same seed, tuned first); the method's own when not given."
        },
    )
    teacher_weight: float = field(
        default=0.5, metadata={"help": "Share of the loss that compares with the teacher, in [0, 1]."}
    )
    teacher_temperature: float = field(
        default=2.0, metadata={"help": "Temperature that softens the predictions of teacher and student."}
    )
    calibration_images_per_class: int = field(
        default=10, metadata={"help": "Training images of each class that one-shot scores are measured on."}
    )
    consistency_check_steps: int = field(
        default=50,
        metadata={
            "help": "On several processes, compare hashes of their scores, masks, prompts and weights every so many "
            "optimizer steps; 0: never."
        },
    )
    score_optim: str = field(
        default="adam", metadata={"help": "Optimizer of the scores, and of the prompt during the search."}
    )
    score_learning_rate: float | str | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the scores; auto: from their threshold, sparsity, steps and schedule. The "
            "method's own when not given: auto where it says so, 1e-4 (the paper's) elsewhere."
        },
    )
    score_travel: float | None = field(
        default=None,
        metadata={
            "help": "Distance that a score can move under score_learning_rate=auto, in multiples of the threshold; "
            "the method's own when not given."
        },
    )
    score_start: str | None = field(
        default=None,
        metadata={
            "help": "Start of the scores that are learned: hydra (the paper's), lamp, snip or magnitude; the "
            "method's own when not given."
        },
    )
    search_prompt_learning_rate: float = field(
        default=1e-4,
        metadata={"help": "Learning rate of the prompt in stages that also learn scores (search, joint)."},
    )
    score_lr_scheduler_type: str | None = field(
        default=None,
        metadata={"help": "Schedule of scores and prompt during the search; lr_scheduler_type when not given."},
    )
    optim: str = field(
        default="sgd",
        metadata={"help": "Optimizer of weights and head, and of the prompt in stages that learn no scores."},
    )
    learning_rate: float = field(default=1e-2, metadata={"help": "Learning rate of the weights."})
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of a new head; learning_rate when not given."}
    )
    prompt_learning_rate: float = field(
        default=1e-2,
        metadata={"help": "Learning rate of the prompt in stages that learn no scores, such as the tune stage."},
    )
    momentum: float = field(default=0.9, metadata={"help": "Momentum of the optimizer sgd."})
    mixup_alpha: float = field(
        default=0.0,
        metadata={"help": "Parameter of MixUp of the training batches (arXiv 1710.09412), such as 0.2; 0: none."},
    )
    cutmix_alpha: float = field(
        default=0.0,
        metadata={
            "help": "Parameter of CutMix of the training batches (arXiv 1905.04899), such as 1.0; 0: none. With both, "
            "one of the two is drawn for every batch."
        },
    )
    prompt_mixing: str = field(
        default="alternate",
        metadata={"help": "Which batches are prompted: alternate (prompted and plain in turn), always or never."},
    )
    eval_prompt: str = field(default="both", metadata={"help": "Evaluate without the prompt, with it, or both."})
    metrics: list[str] | None = field(
        default=None,
        metadata={
            "help": "Metrics reported beside accuracy: mean_per_class_accuracy, top5_accuracy, "
            "expected_calibration_error."
        },
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of every role."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Maximum gradient norm; 0 clips nothing."})
    hub_strategy: str = field(
        default="end", metadata={"help": "When push_to_hub uploads: end, or also at every_save."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop dataset columns that the model does not take."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True,
        metadata={"help": "Restore the callbacks' states when resuming, so that logs continue as if uninterrupted."},
    )

    def __post_init__(self) -> None:
        self._read_flags()
        check_single(self)
        optim = self.optim
        if optim in NOT_IN_TRAINER:
            # TrainingArguments takes its own names only.
            self.optim = "sgd"
        try:
            super().__post_init__()
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"transformers refuses these arguments: {' '.join(str(error).split())}") from error
        if optim in NOT_IN_TRAINER:
            self.optim = optim
        _ = self.pruning_method  # raises if there is none of that name
        self._check_score_settings()
        strategy = HubStrategy(self.hub_strategy)
        if self.push_to_hub and strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
            raise ValueError(
                f"`hub_strategy={strategy.value!r}` would publish optimizer states, which are pickles; use "
                "'end' or 'every_save', and resume from the checkpoints in `output_dir`."
            )
        if self._uses_fsdp and self.device.type == "cpu":
            # accelerate would run DDP instead, without a word.
            raise ValueError(
                "FSDP is asked for, but there is no GPU and accelerate has no FSDP on CPUs; launch with "
                "`recipes/accelerate_configs/ddp_cpu.yaml`."
            )
        check_arguments(self)

    def _read_flags(self) -> None:
        """Convert what flags can only give as text."""
        if isinstance(self.score_learning_rate, str) and self.score_learning_rate != AUTO:
            with suppress(ValueError):  # refused with all other words that are no number
                self.score_learning_rate = float(self.score_learning_rate)

    def _check_score_settings(self) -> None:
        if self.score_optim == PLATON:
            raise ValueError("`score_optim='platon'` needs scores of its own kind; use `method='platon'`.")
        rate = self.score_learning_rate
        if self.score_travel is not None and isinstance(rate, (int, float)):
            raise ValueError(
                f"`score_travel` is {self.score_travel}, but `score_learning_rate` is the number {rate}; leave one of "
                f"the two out, or pass `score_learning_rate={AUTO!r}`."
            )

    @property
    def _uses_fsdp(self) -> bool:
        return bool(self.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")

    @property
    def pruning_method(self) -> Method:
        """Look up the method that `method` names.

        Raises:
            ValueError: there is no method of that name.
        """
        return get_method(self.method)

    @property
    def reported_metrics(self) -> list[str]:
        """Return the names of the reported metrics: accuracy and those of `metrics`."""
        return list(dict.fromkeys(["accuracy", *(self.metrics or [])]))

    def score_settings(self, stage: Stage) -> ScoreSettings:
        """Return start and learning rate of the scores of a stage: its own where the arguments give none."""
        given: dict[str, Any] = {
            "start": self.score_start,
            "learning_rate": self.score_learning_rate,
            "travel": self.score_travel,
        }
        return replace(stage.masks.scores, **{name: value for name, value in given.items() if value is not None})

    def role_settings(self, role: str, stage: Stage) -> RoleSettings:
        """Return optimizer, learning rate and schedule of a role in a stage; scores may have the rate `"auto"`."""
        searching = "scores" in stage.roles and role in ("scores", "prompt")
        learning_rate = {
            "scores": self.score_settings(stage).learning_rate,
            "prompt": self.search_prompt_learning_rate if searching else self.prompt_learning_rate,
            "head": self.learning_rate if self.head_learning_rate is None else self.head_learning_rate,
            "weights": self.learning_rate,
        }[role]
        if role in stage.settings:
            return stage.settings[role]
        optim = self.score_optim if searching else str(getattr(self.optim, "value", self.optim))
        schedule = self.score_lr_scheduler_type if searching else None
        return RoleSettings(optim, learning_rate, schedule or self.lr_scheduler_type)

    def stage_length(self, stage: Stage, stages: Sequence[Stage]) -> tuple[float, int]:
        """Return (epochs, max_steps) of a stage of a run; max_steps is -1 where the epochs count."""
        if stage.length == "warm_up":
            return self.head_warm_up_epochs, -1
        is_search = stage.length == "search"
        epochs = self.search_epochs if is_search else self.num_train_epochs
        if self.total_max_steps > 0 and stage.length == "teacher":
            return epochs, self.total_max_steps
        sharing, budget = budgeted_stages(stages), self.total_max_steps
        if budget > 0 and stage in sharing:
            index, count = sharing.index(stage), len(sharing)
            return epochs, budget * (index + 1) // count - budget * index // count
        return epochs, self.search_max_steps if is_search and self.search_max_steps > 0 else self.max_steps


def budgeted_stages(stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages that share `total_max_steps`."""
    return [stage for stage in stages if stage.length in ("search", "tune") and stage.roles]
