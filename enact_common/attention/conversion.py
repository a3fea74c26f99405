"""Conversion of multi-head attention weights to ENACT's layer."""

from collections.abc import Mapping

import torch
from torch import Tensor

# The tensors of `torch.nn.MultiheadAttention`'s state dict that `clustered_weights` reads.
PACKED = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")


def clustered_weights(weights: Mapping[str, Tensor], num_heads: int, scale_logits: bool = False) -> dict[str, Tensor]:
    """Projections with which `EnactSelfAttention` computes the same as a plain multi-head attention.

    The result is exact while each cluster is one token; longer clusters approximate. The published layer does not scale
    its logits by head_dim^-0.5, and divides the attended values by head_dim. `W_q` takes up the first difference, `W_o`
    the second.

    `W_prob`, which scores the tokens, has no counterpart. Leave it at its small random values: a cluster is then about
    the mean of six neighbours. At zero all tokens score alike, so a sequence has no inflection points and makes only
    three clusters, even with thousands of tokens.

    Args:
        weights: `in_proj_weight` (3 d, d), `in_proj_bias` (3 d,), `out_proj.weight` (d, d), `out_proj.bias` (d,), as in
            the state dict of `torch.nn.MultiheadAttention`. Biases may be missing.
        num_heads: attention heads.
        scale_logits: the layer scales its logits as plain attention does, so the weights stay the same.

    Returns:
        `W_q.weight`, `W_q.bias`, ..., `W_o.bias`, with the dtype and device of the given weights.
    """
    packed = weights["in_proj_weight"]
    embed_dim = packed.shape[1]
    head_dim = embed_dim // num_heads
    bias = weights.get("in_proj_bias")
    if bias is None:
        bias = packed.new_zeros(3 * embed_dim)
    out_bias = weights.get("out_proj.bias")
    if out_bias is None:
        out_bias = packed.new_zeros(embed_dim)
    scale, spread = (1.0, 1.0) if scale_logits else (head_dim**-0.5, float(head_dim))
    factors = {"W_q": scale, "W_k": 1.0, "W_v": 1.0}
    with torch.no_grad():
        converted = {}
        for (name, factor), w, b in zip(factors.items(), packed.chunk(3), bias.chunk(3), strict=True):
            converted |= {f"{name}.weight": w * factor, f"{name}.bias": b * factor}
        return converted | {
            "W_o.weight": weights["out_proj.weight"] * spread,
            "W_o.bias": out_bias.clone(),
        }


def plain_weights(weights: Mapping[str, Tensor], num_heads: int, scale_logits: bool = False) -> dict[str, Tensor]:
    """The inverse of `clustered_weights`: a plain multi-head attention from `EnactSelfAttention`'s projections.

    It computes what the layer would compute if each cluster were one token. `W_prob` has no counterpart.

    Args:
        weights: `W_q.weight` (d, d), `W_q.bias` (d,), ..., `W_o.bias`, as in the layer's state dict.
        num_heads, scale_logits: as in the layer.

    Returns:
        the tensors of `PACKED`, with the dtype and device of the given weights.
    """
    embed_dim = weights["W_q.weight"].shape[1]
    head_dim = embed_dim // num_heads
    scale, spread = (1.0, 1.0) if scale_logits else (head_dim**0.5, 1 / head_dim)
    packed = {}
    with torch.no_grad():
        for part in ("weight", "bias"):
            query, key, value, out = (weights[f"{name}.{part}"] for name in ("W_q", "W_k", "W_v", "W_o"))
            packed[f"in_proj_{part}"] = torch.cat([query * scale, key, value])
            packed[f"out_proj.{part}"] = out * spread if part == "weight" else out.clone()
    return packed
