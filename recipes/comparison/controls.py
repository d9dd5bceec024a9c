"""Controls: methods that change one part of another, to show what that part is worth; added to `METHODS`.

    python recipes/compare_methods.py --methods vpns vpns_noise_prompt

The recipe runs this file first; `vpns_zero_prompt`, the control that every claim about the prompt needs, is part of
the package. It is also the example of how methods of your own are added from a file of yours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from vpns_hf.masking import sharding
from vpns_hf.methods import METHODS, Method, Rounds, Stage
from vpns_hf.methods.magnitude_schedules import GradualMagnitude
from vpns_hf.methods.mask_schedules import Unmasked
from vpns_hf.methods.preparations import RecalibrateBatchNorm, Rewind, Select, StageStart
from vpns_hf.methods.table import DENSE, PROMPT, PROMPT_ALONE, TUNE, WARM_UP, prune_only


class PromptNoise(TrainerCallback):
    """Draw every parameter of the prompt from a normal distribution, by seed, stage and step alone.

    Args:
        plan: plan of the stage.
        std: standard deviation: pixel values in [0, 1], for the prompt `pad`. The default is near the root mean
            square of prompts that were learned on the demo.
    """

    def __init__(self, plan: Any, std: float = 0.01):
        self.plan, self.std = plan, std

    @torch.no_grad()
    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        key = [args.seed, self.plan.index, state.global_step]
        (seed,) = np.random.SeedSequence(key).generate_state(1)
        generator = torch.Generator().manual_seed(int(seed))
        for parameter in kwargs["model"].parameters_by_role()["prompt"].values():
            noise = self.std * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(sharding.split_like(noise, parameter))


class PromptUphill(TrainerCallback):
    """Move the prompt against the network, as an adversary does: its gradients are negated.

    Args:
        plan: plan of the stage.
    """

    def __init__(self, plan: Any):
        self.plan = plan

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        for parameter in kwargs["model"].parameters_by_role()["prompt"].values():
            if parameter.grad is not None:
                parameter.grad.neg_()


@dataclass(frozen=True)
class SelectOnPrompted(Select):
    """Score on calibration images that wear the prompt."""

    def __call__(self, start: StageStart) -> None:
        """Freeze the model with the selected masks."""
        super().__call__(replace(start, calibration=lambda: self._prompted(start)))

    @torch.no_grad()
    def _prompted(self, start: StageStart) -> list[dict[str, Any]]:
        prompt, device = cast(torch.nn.Module, start.model.prompt), start.model.device
        return [batch | {"pixel_values": prompt(batch["pixel_values"].to(device))} for batch in start.calibration()]


@dataclass(frozen=True)
class UsePrompt:
    """Set whether the model predicts with its prompt where nothing else says so, as a teacher does.

    Args:
        value: value of `config.use_prompt`.
    """

    value: bool

    def __call__(self, start: StageStart) -> None:
        """Change the configuration."""
        start.model.config.use_prompt = self.value


# A prompt that is learned on the dense model, before anything is pruned.
PROMPT_FIRST = replace(PROMPT_ALONE, length="search", masks=Unmasked())
PROMPTED_TEACHER = replace(
    DENSE,
    name="teacher",
    length="teacher",
    roles=DENSE.roles | PROMPT,
    batches="prompted",
    before=(UsePrompt(True),),
)


def with_changes(method: str, **changes: Any) -> tuple[Stage | Rounds, ...]:
    """Return the stages of a method that starts with a warm-up, with the same fields changed in all later ones."""
    warm_up, *stages = METHODS[method].stages
    return warm_up, *(replace(stage, **changes) for stage in stages)


CONTROLS = {
    "hydra_augmented": Method(
        "Control: HYDRA on augmented batches alone, as it was published.",
        with_changes("hydra", batches="augmented"),
        is_control=True,
    ),
    "vpns_noise_prompt": Method(
        "Control: the loop of VPNs with noise in place of the learned prompt, on the same pixels.",
        with_changes("hydra", batches="prompted", callbacks=(PromptNoise,)),
        uses_prompt=True,
        is_control=True,
    ),
    "vpns_augmented_prompt": Method(
        "Control: VPNs with prompted batches augmented, like plain ones.",
        with_changes("vpns", batches="prompted_augmented"),
        uses_prompt=True,
        is_control=True,
    ),
    "vpns_sliced_head": Method(
        "VPNs with the pretrained head, of which the rows of the mapped classes are kept.",
        METHODS["vpns"].stages,
        uses_prompt=True,
        backbone={"label_mapping": "frequency", "keep_source_head": False},
        is_control=True,
    ),
    "vpns_source_head": Method(
        "Control: VPNs with the whole pretrained head, of which the mapped classes are read, as in the released code.",
        METHODS["vpns"].stages,
        uses_prompt=True,
        backbone={"label_mapping": "frequency", "keep_source_head": True},
        is_control=True,
    ),
    "vpns_joint_uphill": Method(
        "Control: vpns_joint with a prompt that is moved against the network, as in adversarial training.",
        with_changes("vpns_joint", callbacks=(PromptUphill,)),
        uses_prompt=True,
        is_control=True,
    ),
    "snip_prompted": Method(
        "SNIP scored on images that wear a prompt, which is learned on the dense model first.",
        (WARM_UP, PROMPT_FIRST, replace(TUNE, before=(SelectOnPrompted("snip"),))),
        uses_prompt=True,
        is_control=True,
    ),
    "snip_unprompted": Method(
        "Control: the stages of snip_prompted, scored on the images alone.",
        (WARM_UP, PROMPT_FIRST, replace(TUNE, before=(Select("snip"),))),
        uses_prompt=True,
        is_control=True,
    ),
    "wanda_prompted": Method(
        "Wanda scored on images that wear a prompt, which is learned on the dense model first.",
        (WARM_UP, PROMPT_FIRST, prune_only(SelectOnPrompted("wanda", scope="row"), RecalibrateBatchNorm())[-1]),
        uses_prompt=True,
        is_control=True,
    ),
    "gmp_prompted_teacher": Method(
        "gmp_teacher with a teacher that is tuned with a prompt and sees it, while the student sees the images alone.",
        (WARM_UP, PROMPTED_TEACHER, replace(TUNE, masks=GradualMagnitude(), before=(Rewind(), UsePrompt(False)))),
        uses_prompt=True,
        teacher="self",
        is_control=True,
    ),
    "prompt_only": Method(
        "Train a prompt alone on the model as it is pruned; BatchNorm statistics stay.",
        (PROMPT_ALONE,),
        uses_prompt=True,
        needs_pruned=True,
        is_control=True,
    ),
    "prompt_only_recalibrated": Method(
        "Train a prompt alone on the model as it is pruned, after recalibrating BatchNorm statistics.",
        (replace(PROMPT_ALONE, before=(RecalibrateBatchNorm(),)),),
        uses_prompt=True,
        needs_pruned=True,
        is_control=True,
    ),
    "recalibrate_only": Method(
        "Control: recalibrate BatchNorm statistics of the model as it is pruned, and train nothing.",
        (Stage("recalibrate", frozenset(), "tune", (RecalibrateBatchNorm(),)),),
        needs_pruned=True,
        is_control=True,
    ),
}
METHODS.update(CONTROLS)
