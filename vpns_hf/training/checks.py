"""Check model, data and machine before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset
from transformers import Trainer

from ..masking.channels import Channels
from ..masking.patterns import UNSTRUCTURED, Pattern
from ..methods.stage import Method, Rounds, Stage
from ..model.modeling import PromptedSparseModel
from ..scores.starts import AUTO
from .arguments import SELF, VPNsTrainingArguments, budgeted_stages

if TYPE_CHECKING:
    from .plan import StagePlan


def check_model(model: Any, args: VPNsTrainingArguments, method: Method) -> None:
    """Raise unless the model was built as the method needs it."""
    if not isinstance(model, PromptedSparseModel):
        raise ValueError(
            f"VPNsTrainer trains a PromptedSparseModel, not a {type(model).__name__}; wrap it with "
            "`PromptedSparseModel.from_backbone(model)`."
        )
    problem = model.config.backbone_config.problem_type
    if problem == "regression" or model.config.num_labels == 1:
        raise ValueError(
            f"VPNsTrainer trains classifiers, and this model has `problem_type={problem!r}` and "
            f"{model.config.num_labels} labels; build one with `num_labels` of at least 2."
        )
    if model.prompt is None and (method.uses_prompt or args.eval_prompt == "with"):
        raise ValueError(
            f"`method={args.method!r}` with `eval_prompt={args.eval_prompt!r}` needs a prompt; build the model with "
            "`prompt='pad'`, or use `method='hydra_joint'`."
        )
    _check_trainable(model)
    if method.needs_pruned and model.config.state != "frozen":
        raise ValueError(
            f"`method={args.method!r}` needs a model that is pruned already; load one, or prune it first."
        )
    check_pattern(args.method, method, model.pattern)
    config = model.config.to_dict()
    if wrong := {key: value for key, value in method.backbone.items() if config[key] != value}:
        arguments = ", ".join(f"{key}={value!r}" for key, value in wrong.items())
        raise ValueError(
            f"`method={args.method!r}` needs a model that was built by `from_backbone(..., {arguments})`."
        )


def _check_trainable(model: PromptedSparseModel) -> None:
    """Raise where some layers were frozen by hand: a stage sets `requires_grad` of all weights alike."""
    weights = model.prunable_weights()
    frozen = [name for name, weight in weights.items() if not weight.requires_grad]
    if 0 < len(frozen) < len(weights):
        raise ValueError(
            f"{len(frozen)} of {len(weights)} prunable weights do not require gradients, such as {frozen[0]}, but a "
            "pruning method trains the whole backbone in its stages; call `model.requires_grad_(True)` first. "
            "`ignore_modules=[...]` of `from_backbone` leaves layers unpruned."
        )


def check_pattern(name: str, method: Method, pattern: Pattern) -> None:
    """Raise unless the method works with masks of the pattern.

    Args:
        name: name of the method, for the message.
        method: method.
        pattern: pattern of the model's masks.
    """
    if method.picks_single_weights and pattern is not UNSTRUCTURED:
        raise ValueError(
            f"`method={name!r}` chooses weights one by one, and this model has the pattern {pattern.name!r}; build it "
            "with `pattern='unstructured'`, or use another method, such as 'gmp'."
        )
    if method.revives_weights and isinstance(pattern, Channels):
        raise ValueError(
            f"`method={name!r}` lets pruned weights start again at zero, and a channel all of whose weights are zero "
            "gets no gradient; use another method, such as 'gmp', with `pattern='channels'`."
        )
    for scope in sorted(method.scopes):
        try:
            pattern.check(0.0, scope)
        except ValueError as error:
            raise ValueError(f"`method={name!r}` does not work with this model: {error}") from None


def asked_sparsity(model: PromptedSparseModel, args: VPNsTrainingArguments) -> float:
    """Return the sparsity to prune to: of the arguments, else of the model.

    Raises:
        ValueError: the pattern of the model does not take it.
    """
    return model.pattern.final_sparsity(model.config.sparsity if args.sparsity is None else args.sparsity)


def check_state(stage: Stage, model: PromptedSparseModel, args: VPNsTrainingArguments) -> None:
    """Raise if the stage needs an unpruned model and this one is pruned."""
    if stage.masks.state != "frozen" and model.config.state == "frozen":
        raise ValueError(
            f"`method={args.method!r}` starts from an unpruned model, and this one is pruned already; wrap the "
            "pretrained backbone with `PromptedSparseModel.from_backbone`."
        )


def check_training(
    plans: Sequence[StagePlan], model: PromptedSparseModel, args: VPNsTrainingArguments, data: Any
) -> None:
    """Raise unless the first of the stages that are left can start, and there are images for them."""
    if any(plan.stage.roles for plan in plans) and (data is None or len(data) == 0):
        raise ValueError(
            f"`train_dataset` {'is not given' if data is None else 'holds no image'}; pass the images to train on."
        )
    if plans and not plans[0].preparations:
        check_state(plans[0].stage, model, args)


def check_teacher(
    teacher: str, method: Method, args: VPNsTrainingArguments, model: PromptedSparseModel, loss_func: Any
) -> None:
    """Raise unless the method can learn from the teacher, and can tune one first where that is asked for."""
    stages = [entry.stage if isinstance(entry, Rounds) else entry for entry in method.stages]
    if not any(stage.roles for stage in stages if stage.length != "warm_up"):
        raise ValueError(
            f"`teacher` is {teacher!r}, but `method={args.method!r}` trains nothing that could learn from it; leave "
            "it out."
        )
    if loss_func is not None:
        raise ValueError(
            f"`teacher` is {teacher!r}, but a `compute_loss_func` replaces the loss that it is mixed with; leave one "
            "of the two out."
        )
    if teacher == SELF and method.needs_pruned:
        raise ValueError(
            f"`teacher='self'` tunes the dense model first, and `method={args.method!r}` starts from a pruned one; "
            "pass the folder of a run or a Hub id."
        )
    if teacher == SELF and model.config.label_mapping == "iterative":
        raise ValueError(
            "`teacher='self'` fixes the label mapping before the search, and `label_mapping='iterative'` finds it "
            "again during it; pass the folder of a run or a Hub id."
        )


def check_data(*datasets: Any) -> None:
    """Raise unless every data set can be drawn by index."""
    if any(isinstance(dataset, IterableDataset) for dataset in datasets):
        raise ValueError(
            "VPNsTrainer draws images by index; got a streaming data set. Load it with "
            "`load_transfer_dataset(..., stream_images=n)`, or keep what you need of it with `Dataset.from_generator`."
        )


def check_stages(stages: Sequence[Stage], args: VPNsTrainingArguments) -> None:
    """Raise unless the stages can train in the precision and the steps that the arguments ask for."""
    if args.fp16 and any(stage.masks.has_implicit_gradient or stage.masks.uses_dense_gradients for stage in stages):
        # The loss scale would enter the implicit gradient squared, and a step without gradients cannot be scaled.
        raise ValueError(f"`method={args.method!r}` does not work with fp16; use bf16 or float32.")
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16 needs a GPU, and this run is on the CPU; use bf16 or float32.")
    for stage in stages:
        if "scores" in stage.roles:
            _check_scores(stage, args)
    if 0 < args.total_max_steps < (count := len(budgeted_stages(stages))):
        raise ValueError(
            f"`total_max_steps` is {args.total_max_steps}, but `method={args.method!r}` has {count} stages that train "
            "at this sparsity; give it at least one step for each."
        )


def _check_scores(stage: Stage, args: VPNsTrainingArguments) -> None:
    settings = args.role_settings("scores", stage)
    if stage.masks.signed and (args.score_start is not None or settings.learning_rate == AUTO):
        raise ValueError(
            f"`method={args.method!r}` starts its scores at zero, so it takes no `score_start`, and no "
            "`score_learning_rate='auto'` follows from them; pass a number, such as 0.01."
        )
    if settings.learning_rate == AUTO and "adam" not in settings.optim:
        raise ValueError(
            "`score_learning_rate='auto'` needs steps of about the learning rate, as those of Adam are, and "
            f"`score_optim` is {settings.optim!r}; pass a number, or `score_optim='adam'`."
        )


def check_processes(trainer: Trainer, stages: Sequence[Stage]) -> None:
    """Raise unless the stages can run as the model is spread over the processes."""
    if trainer.is_fsdp_enabled:
        kind = str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
        if not trainer.accelerator.is_fsdp2 or "FULL_STATE_DICT" not in kind:
            raise ValueError(
                "Under FSDP, VPNsTrainer needs `fsdp_version: 2` (version 1 flattens the weights, so that they cannot "
                "be masked) and `fsdp_state_dict_type: FULL_STATE_DICT`, as in "
                "`recipes/accelerate_configs/fsdp2.yaml`."
            )
        if any(stage.masks.uses_dense_gradients for stage in stages):
            raise ValueError(
                f"`method={trainer.args.method!r}` needs whole gradients of pruned weights, which FSDP does not keep; "
                "run it with DDP."
            )
    if trainer.is_deepspeed_enabled and any(stage.masks.changes_frozen_masks for stage in stages):
        raise ValueError(
            f"`method={trainer.args.method!r}` changes masks and momentum while weights train, and DeepSpeed keeps "
            "momentum where it cannot be reached; run it with DDP."
        )
