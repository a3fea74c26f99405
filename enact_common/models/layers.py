"""Building blocks of the three detectors' transformers and heads."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from enact_common.attention.clustering import CLUSTERS
from enact_common.attention.clusters import DEFAULT_SHARE
from enact_common.attention.kernels import AUTO
from enact_common.attention.layer import EnactSelfAttention
from enact_common.attention.rivals import RIVALS, RivalSelfAttention
from enact_common.utils.acceleration import Recomputed

ENCODER_ATTENTIONS = ("enact", "mhsa", *RIVALS)

# Initial bias of a classifier of rare objects (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, section
# 3.3): at a probability of 0.01, the many empty queries do not dominate the first steps.
PRIOR_LOGIT = math.log(0.01 / 0.99)


class MLP(nn.Module):
    """Linear layers, at least one, with ReLU between them."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int):
        super().__init__()
        widths = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in zip(widths, widths[1:], strict=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., input_dim) to (..., output_dim)."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return last(x)


def clone_layers(layer: nn.Module, count: int) -> nn.ModuleList:
    """Return independent copies of a layer, with equal initial weights."""
    return nn.ModuleList(copy.deepcopy(layer) for _ in range(count))


def clustering_settings(args) -> dict:
    """Return the `EntropyClustering` settings from the arguments; missing flags are off.

    Checkpoints of earlier versions have arguments without these flags.
    """
    return {
        "sigma": args.smoothing_sigma,
        "clusters": getattr(args, "enact_clusters", None) or CLUSTERS[0],
        "per_image": bool(getattr(args, "enact_per_image", None)),
        "mask_padding": bool(getattr(args, "enact_mask_padding", None)),
        "max_clusters": getattr(args, "enact_max_clusters", None) or None,
        "temperature": getattr(args, "enact_temperature", None) or None,
        "kernels": getattr(args, "enact_kernels", None) or AUTO,
        "zero_scores": bool(getattr(args, "enact_zero_scores", False)),
    }


def attention_settings(args) -> dict:
    """Return the settings of the encoder's self-attention from the arguments, for `encoder_self_attention`."""
    if args.encoder_attention in RIVALS:
        rival = RIVALS[args.encoder_attention]
        # With `--token_budget 0`, and for checkpoints without the flag, the layer chooses.
        budget = getattr(args, "token_budget", None) or None
        settings = {"token_budget": budget} if rival.takes_budget else {}
        if rival.learns_scores:
            settings["zero_scores"] = bool(getattr(args, "enact_zero_scores", False))
        return settings
    return {**clustering_settings(args), "scale_logits": bool(getattr(args, "enact_scale_logits", False))}


def has_effect(flag: str, attention: str) -> bool:
    """Whether a flag of ENACT or of its rivals has an effect with one of `ENCODER_ATTENTIONS`."""
    if flag == "token_budget":
        return attention in RIVALS and RIVALS[attention].takes_budget
    if flag == "enact_zero_scores" and attention in RIVALS:
        return RIVALS[attention].learns_scores
    if flag == "enact_kernels" and attention == "mhsa":
        return True  # in Anchor DETR
    return attention == "enact"


def scales_logits(args) -> bool:
    """Whether the encoder's self-attention scales its logits by head_dim^-0.5: all except the published ENACT do."""
    return args.encoder_attention != "enact" or bool(getattr(args, "enact_scale_logits", False))


def rival_text(attention: str, token_budget: int | None) -> str:
    """Return a rival's name and its budget in words; a budget of None or 0 is the default one."""
    if not has_effect("token_budget", attention):
        return attention
    return f"{attention}, token budget {token_budget or f'1/{DEFAULT_SHARE} of the tokens'}"


def encoder_settings(args) -> dict:
    """Return all ENACT settings of an encoder with ENACT from the arguments, for reports; default kernels are None."""
    settings = attention_settings(args)
    kernels = None if settings["kernels"] == AUTO else settings["kernels"]
    return {**settings, "kernels": kernels, "order": getattr(args, "enact_order", None)}


def encoder_self_attention(
    kind: str,
    embed_dim: int,
    num_heads: int,
    dropout: float,
    settings: Mapping[str, Any],
    batch_first: bool = False,
) -> EnactSelfAttention | RivalSelfAttention | nn.MultiheadAttention:
    """Build the encoder's self-attention.

    Args:
        kind: "enact", "mhsa" for `nn.MultiheadAttention`, or a name in `RIVALS`.
        embed_dim, num_heads: channels and heads.
        dropout: dropout of the attention weights, except for "enact": ENACT's reference encoder has none.
        settings: settings of `EnactSelfAttention` or of the rival by name; ignored for "mhsa".
        batch_first: tokens are (batch, N, d) instead of (N, batch, d).
    """
    if kind == "enact":
        return EnactSelfAttention(embed_dim, num_heads, batch_first=batch_first, **settings)
    if kind in RIVALS:
        return RIVALS[kind](embed_dim, num_heads, dropout=dropout, batch_first=batch_first, **settings)
    return nn.MultiheadAttention(embed_dim, num_heads, dropout=dropout, batch_first=batch_first)


def map_keywords(attention: nn.Module, size: tuple[int, int] | None) -> dict[str, tuple[int, int] | None]:
    """Return the keywords that pass the map's height and width to an attention; empty if it does not need them."""
    return {"map_size": size} if getattr(attention, "needs_map_size", False) else {}


class FeedForwardLayer(Recomputed):
    """Base class of transformer layers, with their feed-forward network; subclasses add attention and norms.

    `dropout` is between the two linear maps; the other arguments are the numbers of channels d and of hidden channels.
    """

    def __init__(self, d_model: int, dim_feedforward: int, dropout: float):
        super().__init__()
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)

    COMPILED = ("feed_forward",)

    def feed_forward(self, x: Tensor) -> Tensor:
        """Apply two linear maps to (..., d), with ReLU and dropout between them."""
        return self.linear2(self.dropout(F.relu(self.linear1(x))))


class TransformerEncoderLayer(FeedForwardLayer):
    """Self-attention and a feed-forward network, each with a residual connection and a layer norm.

    The attention is passed in, so that clustered and plain attention share this code.

    Args:
        self_attn: has the call signature of `nn.MultiheadAttention`, on (N, batch, d). If it has `needs_map_size`, it
            also gets the map's size.
        d_model: channels d.
        dim_feedforward: hidden channels of the feed-forward network.
        dropout: probability, after the attention, inside and after the feed-forward network.
        normalize_before: normalise the input of each block instead of its output (pre-norm).
    """

    def __init__(
        self,
        self_attn: nn.Module,
        d_model: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        normalize_before: bool = False,
    ):
        super().__init__(d_model, dim_feedforward, dropout)
        self.self_attn = self_attn
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.normalize_before = normalize_before

    def forward(
        self,
        src: Tensor,
        key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Run the layer on src (N, batch, d), and return this shape.

        Args:
            src: (N, batch, d).
            key_padding_mask: bool (batch, N), True where padded.
            pos: (N, batch, d), added to queries and keys but not to values.
            size: height and width of the map, for attentions that need it.
        """
        if self.normalize_before:
            src = src + self.dropout1(self.attend(self.norm1(src), key_padding_mask, pos, size))
            return src + self.dropout2(self.feed_forward(self.norm2(src)))
        src = self.norm1(src + self.dropout1(self.attend(src, key_padding_mask, pos, size)))
        return self.norm2(src + self.dropout2(self.feed_forward(src)))

    def attend(
        self, x: Tensor, key_padding_mask: Tensor | None, pos: Tensor | None, size: tuple[int, int] | None
    ) -> Tensor:
        """Self-attention over tokens (N, batch, d)."""
        with_pos = x if pos is None else x + pos
        keywords = {"key_padding_mask": key_padding_mask, "need_weights": False, **map_keywords(self.self_attn, size)}
        return self.self_attn(with_pos, with_pos, value=x, **keywords)[0]


class DecoderLayer(FeedForwardLayer):
    """Three residual blocks: attention among the queries, attention to the memory, a feed-forward network.

    This is a base class: subclasses define how to attend. Arguments are those of `TransformerEncoderLayer`.
    """

    def __init__(self, d_model: int, dim_feedforward: int, dropout: float, normalize_before: bool):
        super().__init__(d_model, dim_feedforward, dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)
        self.normalize_before = normalize_before

    def run_blocks(
        self, tgt: Tensor, attend_queries: Callable[[Tensor], Tensor], attend_memory: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the queries tgt (Q, batch, d) after all three blocks. Both functions keep their shape."""
        blocks = (
            (attend_queries, self.norm1, self.dropout1),
            (attend_memory, self.norm2, self.dropout2),
            (self.feed_forward, self.norm3, self.dropout3),
        )
        for block, norm, dropout in blocks:
            tgt = tgt + dropout(block(norm(tgt))) if self.normalize_before else norm(tgt + dropout(block(tgt)))
        return tgt
