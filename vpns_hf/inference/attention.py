"""`nn.MultiheadAttention` with its projections as linear layers, which sparse kernels can replace."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ProjectedAttention(nn.Module):
    """Multi-head attention with one linear layer for each projection; arguments and results as of
    [`torch.nn.MultiheadAttention`].

    Args:
        attention: without extra keys (`add_bias_kv`, `add_zero_attn`); its weights are copied.
    """

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        self.num_heads, self.batch_first = attention.num_heads, attention.batch_first
        if attention.in_proj_weight is None:
            weights = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
        else:
            weights = list(attention.in_proj_weight.chunk(3))
        biases = [None] * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        self.query, self.key, self.value = map(_linear, weights, biases)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; masks are refused, image classifiers have none."""
        if key_padding_mask is not None or attn_mask is not None or is_causal:
            raise ValueError("Sparse inference takes no attention masks; run this model densely.")
        inputs, projections = [query, key, value], [self.query, self.key, self.value]
        tokens_first = query.dim() == 3 and not self.batch_first
        if tokens_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        heads = [
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
            for projection, x in zip(projections, inputs, strict=True)
        ]
        attended = F.scaled_dot_product_attention(*heads)
        output = self.out_proj(attended.transpose(-3, -2).flatten(-2))
        if tokens_first:
            output = output.transpose(0, 1)
        return output, _weights(heads[0], heads[1], average_attn_weights) if need_weights else None


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


def _weights(query: Tensor, key: Tensor, average: bool) -> Tensor:
    weights = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(dim=-1)
    return weights.mean(dim=-3) if average else weights


def project_attention(model: nn.Module) -> None:
    """Replace every [`torch.nn.MultiheadAttention`] in a model by [`ProjectedAttention`].

    Those within [`torch.nn.TransformerEncoderLayer`], whose forward reads the weights of its parts, stay.
    """
    for name, module in list(model.named_children()):
        # Extra keys and subclasses are for other than image classifiers.
        if type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn:
            setattr(model, name, ProjectedAttention(module).eval())
        elif not isinstance(module, nn.TransformerEncoderLayer):
            project_attention(module)
