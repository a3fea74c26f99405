"""Multi-head attention's weights in the form that ENACT's layer takes them."""

from collections.abc import Mapping

import torch
from torch import Tensor

# What `clustered_weights` reads, of `torch.nn.MultiheadAttention`'s state dict.
PACKED = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")


def clustered_weights(weights: Mapping[str, Tensor], num_heads: int, scale_logits: bool = False) -> dict[str, Tensor]:
    """The projections of an `EnactSelfAttention` that computes what a plain multi-head attention does.

    Exactly so while each cluster is one token; from there on, clusters stand for their tokens. As published, ENACT's
    layer neither scales its logits by e^-0.5 nor leaves the attended values as they are (it divides them by e), e being
    the width of a head: the first goes into `W_q`, the second into `W_o`.

    What scores the tokens, `W_prob`, has no counterpart. Leave it at its small random values, with which a cluster is
    about the mean of some six neighbours. At zero all tokens would score alike, and a sequence without inflection
    points, of thousands of tokens too, falls into three clusters.

    Args:
        weights: `in_proj_weight` (3 d, d), `in_proj_bias` (3 d,), `out_proj.weight` (d, d), `out_proj.bias` (d,), as in
            the state dict of `torch.nn.MultiheadAttention`; an attention without biases leaves those out.
        num_heads: attention heads.
        scale_logits: the layer does scale them, and leaves the values as they are: the weights stay what they are too.

    Returns:
        `W_q.weight`, `W_q.bias`, ..., `W_o.bias`, in the dtype and on the device of what was given.
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
