"""A pruning method is a list of stages; a new method is one entry in `METHODS`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Stage:
    """One training run of a method.

    Args:
        name: shown in logs and in the folder of its checkpoints.
        roles: what trains: any of `scores`, `prompt`, `head` (a new head) and `weights`.
        state: what the mask does. `"search"`: weights are masked by the mask selected from the scores, refreshed after
            every optimizer step if the scores train. `"frozen"`: the mask is fixed and the zeros are written into the
            weights. `"dense"`: nothing is masked.
        length: whose epochs and steps of the arguments apply: `"warm_up"`, `"search"` or `"tune"`.
        prompted: whether prompted batches are mixed in as `prompt_mixing` says; if not, or if the model has no prompt,
            every batch is plain.
        sparsity: replaces the sparsity asked for; 0 keeps every weight.
        only_new_head: skipped when the head is the pretrained one.
    """

    name: str
    roles: frozenset[str]
    state: Literal["search", "frozen", "dense"]
    length: Literal["warm_up", "search", "tune"]
    prompted: bool = False
    sparsity: float | None = None
    only_new_head: bool = False


@dataclass(frozen=True)
class Method:
    """Stages run one after the other on the same model.

    Args:
        description: one sentence.
        stages: in order.
        uses_prompt: whether the model must have a prompt and is evaluated with it, too.
    """

    description: str
    stages: tuple[Stage, ...]
    uses_prompt: bool = False

    def stages_for(self, new_head: bool) -> tuple[Stage, ...]:
        """The stages that run on a model with or without a new head."""
        return tuple(stage for stage in self.stages if new_head or not stage.only_new_head)


# Scores learned under a random head mean nothing, so a new head is trained first, on the dense frozen backbone.
_WARM_UP = Stage("warm_up", frozenset({"head"}), "search", "warm_up", sparsity=0.0, only_new_head=True)


def _search_and_tune(prompted: bool, trains_prompt: bool) -> tuple[Stage, ...]:
    prompt = {"prompt"} if trains_prompt else set()
    return (
        _WARM_UP,
        Stage("search", frozenset({"scores", "head"} | prompt), "search", "search", prompted),
        Stage("tune", frozenset({"weights", "head"} | prompt), "frozen", "tune", prompted),
    )


METHODS: dict[str, Method] = {
    "vpns": Method(
        "Learn masks and a visual prompt together, then tune weights and prompt (arXiv 2312.01397).",
        _search_and_tune(prompted=True, trains_prompt=True),
        uses_prompt=True,
    ),
    "vpns_zero_prompt": Method(
        "Control: the loop of VPNs with the prompt held at zero.",
        _search_and_tune(prompted=True, trains_prompt=False),
        uses_prompt=True,
    ),
    "hydra": Method(
        "Learn masks alone, then tune the weights (arXiv 2002.10509).",
        _search_and_tune(prompted=False, trains_prompt=False),
    ),
    "dense": Method(
        "Reference: the loop of VPNs tuning all weights, with nothing pruned and the prompt held at zero.",
        (_WARM_UP, Stage("tune", frozenset({"weights", "head"}), "dense", "tune", prompted=True)),
    ),
}


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in METHODS:
        raise ValueError(f"`method` is {name!r}; expected one of {', '.join(METHODS)}.")
    return METHODS[name]
