"""Multi-head attention whose queries, keys and values come projected, and may differ in width."""

from torch import Tensor, nn
from torch.nn import functional as F


class MultiheadAttention(nn.Module):
    """`out_proj(softmax(Q K^T / sqrt(e)) V)`, e being a query's width in one head.

    The weights are never stored where `scaled_dot_product_attention` has a fused kernel.

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
        """Attend.

        Args:
            query: (Q, batch, heads * e), the heads' channels one after the other.
            key: (N, batch, heads * e).
            value: (N, batch, embed_dim).
            key_padding_mask: bool (batch, N), True where padded.

        Returns:
            (Q, batch, embed_dim).
        """
        q, k, v = (
            # (length, batch, channels) -> (batch, heads, length, channels / heads)
            tensor.unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0, 3)
            for tensor in (query, key, value)
        )
        present = None if key_padding_mask is None else ~key_padding_mask[:, None, None]  # (batch, 1, 1, N)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=present, dropout_p=dropout)
        return self.out_proj(attended.permute(2, 0, 1, 3).flatten(2))  # (batch, heads, Q, e) -> (Q, batch, embed_dim)
