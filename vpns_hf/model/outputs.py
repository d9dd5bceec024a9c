"""Request attentions and hidden states of the backbone, and check that it returns them."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedConfig
from transformers.modeling_outputs import ModelOutput


def requested_outputs(
    config: PreTrainedConfig, output_attentions: bool | None, output_hidden_states: bool | None
) -> list[str]:
    """List which of `attentions` and `hidden_states` a call requests; None leaves it to the configuration."""
    requests = {
        "attentions": config.output_attentions if output_attentions is None else output_attentions,
        "hidden_states": config.output_hidden_states if output_hidden_states is None else output_hidden_states,
    }
    return [name for name, requested in requests.items() if requested]


def check_outputs(output: ModelOutput, names: Sequence[str], backbone: str) -> None:
    """Refuse an output that lacks one of the requested fields.

    Raises:
        ValueError: it does.
    """
    for name in names:
        values = output.get(name)
        if not values or any(value is None for value in values):
            raise ValueError(
                f"{backbone} returns no {name.replace('_', ' ')}; do not request them, or, for attentions, call "
                '`model.set_attn_implementation("eager")` first.'
            )
