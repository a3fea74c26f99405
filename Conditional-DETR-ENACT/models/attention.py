"""Multi-head attention for queries, keys and values that are already projected and may have different head_dims."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MultiheadAttention(nn.Module):
    """`out_proj(softmax(Q K^T / sqrt(head_dim)) V)`, with the head_dim of queries and keys.

    Attention weights are never stored where `scaled_dot_product_attention` has a fused kernel.

    Args:
        embed_dim: channels of values and output.
        num_heads: attention heads.
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Attend from queries to keys.

        Args:
            query: (Q, batch, heads * head_dim), head by head.
            key: (N, batch, heads * head_dim).
            value: (N, batch, embed_dim).
            key_padding_mask: bool (batch, N), True where padded.

        Returns:
            (Q, batch, embed_dim).
        """
        q, k, v = self.heads(query), self.heads(key), self.heads(value)
        present = None if key_padding_mask is None else ~key_padding_mask[:, None, None]  # (batch, 1, 1, N)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=present, dropout_p=dropout)
        return self.join_heads(attended)

    def with_weights(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the result of `forward`, and the attention weights; for inspection, not for training.

        Args:
            query, key, value, key_padding_mask: as in `forward`.

        Returns:
            (Q, batch, embed_dim); and (batch, heads, Q, N), where the weights of each query add up to 1.
        """
        q, k = self.heads(query), self.heads(key)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if key_padding_mask is not None:
            logits = logits.masked_fill(key_padding_mask[:, None, None], -torch.inf)
        weights = logits.softmax(dim=-1)
        return self.join_heads(weights @ self.heads(value)), weights

    def heads(self, x: Tensor) -> Tensor:
        """Split the heads: (length, batch, channels) to (batch, heads, length, channels / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0, 3)

    def join_heads(self, attended: Tensor) -> Tensor:
        """Join the heads and project: (batch, heads, Q, head_dim) to (Q, batch, embed_dim)."""
        return self.out_proj(attended.permute(2, 0, 1, 3).flatten(2))
