"""The base class of the rival layers: multi-head self-attention over a given number of keys and values."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..clusters import default_budget

# Keys, values and, if logits need a bias, that bias: (batch, M, d), (batch, M, d), (batch, M) or None.
Reduced = tuple[Tensor, Tensor, Tensor | None]


class RivalSelfAttention(nn.Module):
    """Self-attention over at most `token_budget` keys and values, with the call signature of `nn.MultiheadAttention`.

    `W_o softmax(Q K^T / sqrt(head_dim)) V`, with the parameter names of `EnactSelfAttention`. A subclass defines
    `reduce`, which makes the M keys and values from all N. A method that does more than this overrides `attend`.

    No result may depend on padded tokens, or on the other images of a batch.

    Args:
        embed_dim: channels d of queries, keys, values and output; a multiple of num_heads.
        num_heads: attention heads.
        dropout: probability of dropping an attention weight in training.
        batch_first: tensors are (batch, N, d) instead of (N, batch, d).
        token_budget: M, the most keys and values per image; None for `default_budget`.
        map_size: height and width of the feature map, for callers that cannot pass it to `forward`.

    Attributes:
        needs_map_size: whether the method needs the map's height and width.
        takes_budget: whether the method has a number of keys to choose.
        exact_at_full_budget: whether a budget of N gives plain multi-head attention.
        export_fault: why the layer cannot be exported; None if it can.

    Raises:
        ValueError: embed_dim is not a multiple of num_heads, or the budget is below 1.
    """

    needs_map_size = False
    takes_budget = True
    exact_at_full_budget = True
    export_fault: str | None = None

    # Keeps `nn.TransformerEncoder` and its layer off their fused paths, which need packed projections.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        batch_first: bool = False,
        token_budget: int | None = None,
        map_size: tuple[int, int] | None = None,
    ):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim ({embed_dim}) must be a multiple of num_heads ({num_heads})")
        if token_budget is not None and token_budget < 1:
            raise ValueError(f"token_budget must be at least 1, or None for the default, got {token_budget}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self.token_budget = token_budget
        self.map_size = map_size
        self.W_q = nn.Linear(embed_dim, embed_dim)
        self.W_k = nn.Linear(embed_dim, embed_dim)
        self.W_v = nn.Linear(embed_dim, embed_dim)
        self.W_o = nn.Linear(embed_dim, embed_dim)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        map_size: tuple[int, int] | None = None,
    ) -> tuple[Tensor, None]:
        """Attend from every query to the reduced keys.

        Args:
            query, key, value: (N, batch, d), or (batch, N, d) if batch_first; in row-major order of the feature map.
            key_padding_mask: bool (batch, N), True where padded; or floating point, minus infinity where padded.
            need_weights, attn_mask, is_causal: as in `nn.MultiheadAttention`; only these defaults are supported.
            average_attn_weights: ignored, since no weights are returned.
            map_size: height and width of the feature map; None for the constructor's.

        Returns:
            (output, None); output has the query's shape.

        Raises:
            ValueError: weights or an attention mask are requested, or the map's size is needed and missing or wrong.
        """
        name = type(self).__name__
        if need_weights or attn_mask is not None or is_causal:
            raise ValueError(
                f"{name} attends to reduced keys instead of tokens, so it returns no weights and takes no attention "
                "mask. Call it with need_weights=False, attn_mask=None, is_causal=False."
            )
        if not self.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        size = map_size or self.map_size
        if self.needs_map_size and (size is None or size[0] * size[1] != key.shape[1]):
            raise ValueError(
                f"{name} needs the height and width of the feature map as map_size, whose product is the number of "
                f"tokens, {key.shape[1]}; got {size}"
            )
        if key_padding_mask is None:
            present = torch.ones(key.shape[:2], dtype=torch.bool, device=key.device)
        else:
            padded = key_padding_mask.isneginf() if key_padding_mask.is_floating_point() else key_padding_mask
            present = ~padded
        output = self.W_o(self.attend(query, key, value, present, size))
        return (output if self.batch_first else output.transpose(0, 1)), None

    def budget(self, num_tokens: int) -> int:
        """Return M for N tokens: the budget, or the default one; in 1..N."""
        return min(default_budget(num_tokens) if self.token_budget is None else self.token_budget, num_tokens)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, present: Tensor, map_size: tuple[int, int] | None
    ) -> Tensor:
        """Return the attended values with joined heads, (batch, L, d).

        Args:
            query: (batch, L, d), not projected.
            key, value: (batch, N, d), not projected.
            present: bool (batch, N), False where padded.
            map_size: height and width of the feature map; None if unknown.
        """
        key, value, bias = self.reduce(key, value, present, map_size)
        return self.softmax_attention(self.W_q(query), self.W_k(key), self.W_v(value), bias)

    def softmax_attention(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Multi-head attention of projected queries (batch, L, d) to projected keys and values (batch, M, d).

        Args:
            query, key, value: projected.
            bias: (batch, M), added to the logits, minus infinity for missing keys; None for none.

        Returns:
            (batch, L, d).
        """
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
        if bias is not None:
            # The softmax over the keys of an image of only padding would be NaN.
            bias = bias.masked_fill(bias.isneginf().all(dim=1, keepdim=True), 0.0)
            bias = bias[:, None, None].to(q.dtype)  # (batch, 1, 1, M)
        attended = F.scaled_dot_product_attention(q, k, v, bias, self.dropout if self.training else 0.0)
        return attended.transpose(1, 2).flatten(2)  # (batch, heads, L, head_dim) -> (batch, L, d)

    def reduce(self, key: Tensor, value: Tensor, present: Tensor, map_size: tuple[int, int] | None) -> Reduced:
        """Reduce the keys and values to at most `budget(N)`. Arguments and shapes: as in `attend`, and `Reduced`."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        budget = "default" if self.token_budget is None else self.token_budget
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, token_budget={budget}, dropout={self.dropout}"


def pool_by_index(tokens: Tensor, index: Tensor, weights: Tensor, count: int) -> Tensor:
    """Sum weighted tokens by their index.

    Args:
        tokens: (batch, N, d).
        index: int64 (batch, N), in 0..count - 1.
        weights: (batch, N), 0 for tokens that do not count.
        count: M.

    Returns:
        (batch, M, d), in the tokens' dtype; zero where no token has the index.
    """
    pooled = weights.new_zeros(len(tokens), count, tokens.shape[-1])
    weighted = tokens * weights.unsqueeze(-1)
    return pooled.scatter_add(1, index.unsqueeze(-1).expand_as(weighted), weighted).to(tokens.dtype)


def average_by_index(tokens: tuple[Tensor, ...], index: Tensor, present: Tensor, count: int):
    """Average tokens by their index.

    Args:
        tokens: tensors (batch, N, d).
        index: int64 (batch, N), in 0..count - 1.
        present: bool (batch, N), False for tokens that do not count.
        count: M.

    Returns:
        the averages (batch, M, d) of each tensor; and the number of tokens of each index, float32 (batch, M).
    """
    weights = present.to(torch.float32)
    sizes = weights.new_zeros(len(index), count).scatter_add(1, index, weights)
    shares = weights / sizes.clamp(min=1).gather(1, index)
    return [pool_by_index(tensor, index, shares, count) for tensor in tokens], sizes
