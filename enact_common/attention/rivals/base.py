"""The base class of the rival layers: multi-head self-attention over a given number of keys and values."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..clusters import clusters_of_images, most_clusters, move_to_front
from ..tracing import is_tracing

# Keys, values and, if logits need a bias, that bias: (batch, M, d), (batch, M, d), (batch, M) or None.
Reduced = tuple[Tensor, Tensor, Tensor | None]

# Fused kernels take multiples of 8 channels.
BIAS_CHANNELS = 8


class RivalSelfAttention(nn.Module):
    """Self-attention over at most `token_budget` keys and values, with the call signature of `nn.MultiheadAttention`.

    `W_o softmax(Q K^T / sqrt(head_dim)) V`, with the parameter names of `EnactSelfAttention`. A subclass defines
    `reduce`, which makes the M keys and values from all N. A method that does more than this overrides `attend`.

    No result depends on padded tokens, or on the other images of a batch: M is the most for the padded length N, and
    each image uses as many as its own tokens allow (`image_budgets`).

    Args:
        embed_dim: channels d of queries, keys, values and output; a multiple of num_heads.
        num_heads: attention heads.
        dropout: probability of dropping an attention weight in training.
        batch_first: tensors are (batch, N, d) instead of (N, batch, d).
        token_budget: M, the most keys and values per image; None for `default_budget` of its tokens.
        map_size: height and width of the feature map, for callers that cannot pass it to `forward`.
        zero_scores: as in `EntropyClustering`, for methods that learn scores.

    Attributes:
        title: what the method does, for tables and charts.
        needs_map_size: whether the method needs the map's height and width.
        takes_budget: whether the method has a number of keys to choose.
        learns_scores: whether the method selects keys by learned scores, `W_score`.
        exact_at_full_budget: whether a budget of N gives plain multi-head attention.
        export_fault: why the layer cannot be exported; None if it can.

    Raises:
        ValueError: embed_dim is not a multiple of num_heads, the budget is below 1, or a setting is not of this method.
    """

    title = ""
    needs_map_size = False
    takes_budget = True
    learns_scores = False
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
        zero_scores: bool = False,
    ):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim ({embed_dim}) must be a multiple of num_heads ({num_heads})")
        if token_budget is not None and token_budget < 1:
            raise ValueError(f"token_budget must be at least 1, or None for the default, got {token_budget}")
        if token_budget is not None and not self.takes_budget:
            raise ValueError(f"{type(self).__name__} has no token_budget, got {token_budget}; leave it out")
        if zero_scores and not self.learns_scores:
            raise ValueError(f"{type(self).__name__} learns no scores: leave out zero_scores")
        self.zero_scores = zero_scores
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

    def start_scores(self) -> None:
        """As in `EntropyClustering`."""
        if self.zero_scores:
            nn.init.zeros_(self.W_score.weight)

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
            # Attention to no key would be NaN, so an image of only padding attends to its padding.
            present = ~padded | padded.all(dim=1, keepdim=True)
        output = self.W_o(self.attend(query, key, value, present, size))
        return (output if self.batch_first else output.transpose(0, 1)), None

    def budget(self, num_tokens: int) -> int:
        """Return M for N tokens: the budget, or the default one; in 1..N."""
        return most_clusters(self.token_budget, num_tokens)

    def image_budgets(self, present: Tensor) -> Tensor:
        """Return `budget` for each image's own tokens: int64 (batch,), in 1..M.

        Args:
            present: bool (batch, N), False where padded.
        """
        return clusters_of_images(self.token_budget, present.sum(dim=1))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, present: Tensor, map_size: tuple[int, int] | None
    ) -> Tensor:
        """Return the attended values with joined heads, (batch, L, d).

        Args:
            query: (batch, L, d), not projected.
            key, value: (batch, N, d), not projected.
            present: bool (batch, N), False where padded; at least one token of an image is True.
            map_size: height and width of the feature map; None if unknown.
        """
        with torch.autocast(key.device.type, enabled=False):
            key, value, bias = self.reduce(key, value, present, map_size)
        return self.softmax_attention(self.W_q(query), self.W_k(key), self.W_v(value), bias)

    def softmax_attention(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Multi-head attention of projected queries (batch, L, d) to projected keys and values (batch, M, d).

        Args:
            query, key, value: projected.
            bias: (batch, M), added to the logits, minus infinity for missing keys, but not all keys; None for none.

        Returns:
            (batch, L, d).
        """
        q, k, v = (self.split_heads(tensor) for tensor in (query, key, value))
        head_dim = q.shape[-1]
        if bias is not None:
            if bias.requires_grad and not is_tracing():
                q, k, v, bias = bias_to_channels(q, k, v, bias)
            # In an exported graph, a bias with a gradient would be computed without fused kernels.
            bias = bias.detach()[:, None, None].to(q.dtype)  # (batch, 1, 1, M)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=head_dim**-0.5)[..., :head_dim]
        return attended.transpose(1, 2).flatten(2)  # (batch, heads, L, head_dim) -> (batch, L, d)

    def split_heads(self, tokens: Tensor) -> Tensor:
        """Return projected tokens (batch, N, d) as (batch, heads, N, head_dim)."""
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def reduce(self, key: Tensor, value: Tensor, present: Tensor, map_size: tuple[int, int] | None) -> Reduced:
        """Reduce the keys and values to at most `budget(N)`. Arguments and shapes: as in `attend`, and `Reduced`.

        It runs outside autocast; the tensors may be of any floating dtype.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        budget = "default" if self.token_budget is None else self.token_budget
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, token_budget={budget}, dropout={self.dropout}"


def bias_to_channels(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Move a bias that needs a gradient into more channels of queries and keys.

    For the gradient of a bias, `scaled_dot_product_attention` stores a (queries x keys) matrix per head.

    Args:
        q: (batch, heads, L, head_dim); its product with k is to be scaled by head_dim^-0.5.
        k, v: (batch, heads, M, head_dim).
        bias: (batch, M), minus infinity for missing keys.

    Returns:
        q, k, v with more channels, zero in v; and the rest of the bias, 0 or minus infinity: (batch, M).
    """
    missing = bias.isneginf()
    share = bias.masked_fill(missing, 0.0) * (q.shape[-1] ** 0.5 / BIAS_CHANNELS)
    share = share[:, None, :, None].to(k.dtype).expand(*k.shape[:3], BIAS_CHANNELS)
    rest = torch.zeros_like(bias).masked_fill(missing, -torch.inf)
    more = (0, BIAS_CHANNELS)
    return F.pad(q, more, value=1.0), torch.cat((k, share), dim=-1), F.pad(v, more), rest


@torch.no_grad()
def features_of(projection: nn.Linear, tokens: Tensor) -> Tensor:
    """Return projected tokens to compare with each other: float32 (batch, N, d), without gradient."""
    return F.linear(tokens.float(), projection.weight.float(), projection.bias.float())


def take_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Return the tokens (batch, M, d) at int64 index (batch, M) of tokens (batch, N, d)."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def spread_evenly(present: Tensor, counts: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Choose tokens that are spread evenly over each image's own tokens, in row-major order.

    Args:
        present: bool (batch, N), False where padded.
        counts: int64 (batch,), tokens to choose, in 1..most; at most the image's own.
        most: M, at most N.

    Returns:
        the chosen tokens, int64 (batch, M), without repeats; and whether they count, bool (batch, M): `counts` do.
    """
    counts = counts.unsqueeze(1)
    own = present.sum(dim=1, keepdim=True)  # (batch, 1)
    place = present.cumsum(dim=1)  # (batch, N), 1 for the first own token
    # Cut the own tokens into `counts` runs whose lengths differ by at most one, and choose the last of each.
    chosen = present & (place * counts // own > (place - 1) * counts // own)
    index = move_to_front(chosen)[:, :most]
    return index, chosen.gather(1, index)


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
    weighted = tokens * weights.unsqueeze(-1)
    pooled = weighted.new_zeros(tokens.shape[0], count, tokens.shape[-1])
    return pooled.scatter_add(1, index.unsqueeze(-1).expand_as(weighted), weighted).to(tokens.dtype)


def average_by_index(
    tokens: tuple[Tensor, ...], index: Tensor, present: Tensor, count: int
) -> tuple[list[Tensor], Tensor]:
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
    sizes = weights.new_zeros(index.shape[0], count).scatter_add(1, index, weights)
    shares = weights / sizes.clamp(min=1).gather(1, index)
    return [pool_by_index(tensor, index, shares, count) for tensor in tokens], sizes
