"""Row-column decoupled attention, plain (Wang et al., "Anchor DETR", AAAI 2022, section 3.4) and over the clusters of
ENACT (Savathrakis and Argyros, arXiv:2409.07541).

Attention to a map's cell is the product of attention to its column and to its row. What either sums over is never
held whole: see `row_column_product`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .row_column_product import clustered_row_column_product, row_column_product


class RowColumnAttention(nn.Module):
    """What both have: five packed input projections, heads, and the output projection.

    Args:
        embed_dim: channels d; a multiple of num_heads.
        num_heads: attention heads.
        dropout: probability of dropping a row's or a column's attention weight in training.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(5 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(5 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def projections(self) -> list[tuple[Tensor, Tensor]]:
        """(weight (d, d), bias (d,)) of each of the five, to be taken once a call: each cut costs the backward one."""
        return list(zip(self.in_proj_weight.chunk(5), self.in_proj_bias.chunk(5), strict=True))

    def heads(self, x: Tensor) -> Tensor:
        """(batch, L, d) to (batch, heads, L, e)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def weights(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention weights of projected queries (batch, L, d) over keys (batch, S, d): (batch * heads, L, S).

        Args:
            query, key: projected.
            mask: bool (batch, S), True where padded.
        """
        query, key = self.heads(query), self.heads(key)
        # Scaled where there are fewer of them.
        logits = query @ (key * key.shape[-1] ** -0.5).transpose(-2, -1)  # (batch, heads, L, S)
        if mask is not None:
            logits = logits.masked_fill(mask[:, None, None], -torch.inf)
        weights = F.dropout(logits.softmax(dim=-1), self.dropout, self.training)
        # Autocast's softmax is float32: the products that follow run in the projections' precision.
        return weights.to(query.dtype).flatten(0, 1)


class MultiheadRCDA(RowColumnAttention):
    """Queries attend to a map: the columns' weights and the rows' weights over its cells.

    The five projections are of row queries, column queries, row keys, column keys and values. "Row" is what lies along
    a row: its keys are the map's W columns, averaged over the height.
    """

    def forward(
        self,
        query: Tensor,
        query_row_pos: Tensor,
        query_col_pos: Tensor,
        key_row: Tensor,
        key_col: Tensor,
        value: Tensor,
        mask_row: Tensor | None = None,
        mask_col: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (batch, ..., d), contents.
            query_row_pos, query_col_pos: broadcast against the query: embeddings of its x and its y.
            key_row: (batch, W, d), the map's mean over its rows, with the embedding of x.
            key_col: (batch, H, d), its mean over its columns, with the embedding of y.
            value: (batch, H, W, d).
            mask_row, mask_col: bool (batch, W) and (batch, H), True where padded.

        Returns:
            the query's shape.
        """
        row, col, v = self.factors(query, query_row_pos, query_col_pos, key_row, key_col, value, mask_row, mask_col)
        attended = row_column_product(row, col, v)  # (batch * heads, Q, e)
        return self.join_heads(attended).view_as(query)

    def with_weights(self, query: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
        """What `forward` returns, and the map's weights, which are formed for that: to look at, not to train with.

        Args:
            query, others: as in `forward`.

        Returns:
            the query's shape; and (batch, heads, Q, H W), each query's adding up to one.
        """
        row, col, v = self.factors(query, *others)
        weights = (col.unsqueeze(3) * row.unsqueeze(2)).flatten(2)  # (batch * heads, Q, H W)
        attended = weights @ v.flatten(1, 2)
        return self.join_heads(attended).view_as(query), weights.unflatten(0, (-1, self.num_heads))

    def factors(
        self,
        query: Tensor,
        query_row_pos: Tensor,
        query_col_pos: Tensor,
        key_row: Tensor,
        key_col: Tensor,
        value: Tensor,
        mask_row: Tensor | None = None,
        mask_col: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the product is of, for arguments of `forward`: weights along rows (batch * heads, Q, W) and along
        columns (batch * heads, Q, H), and values (batch * heads, H, W, e)."""
        query_row, query_col, row_key, col_key, values = self.projections()
        # A projected sum is the sum of the projections: contents and positions need not be added at full size first.
        q_row = F.linear(query, *query_row) + F.linear(query_row_pos, query_row[0])
        q_col = F.linear(query, *query_col) + F.linear(query_col_pos, query_col[0])
        row = self.weights(q_row.flatten(1, -2), F.linear(key_row, *row_key), mask_row)  # (batch * heads, Q, W)
        col = self.weights(q_col.flatten(1, -2), F.linear(key_col, *col_key), mask_col)  # (batch * heads, Q, H)
        v = F.linear(value, *values).unflatten(-1, (self.num_heads, -1))  # (batch, H, W, heads, e)
        return row, col, v.permute(0, 3, 1, 2, 4).flatten(0, 1)

    def join_heads(self, attended: Tensor) -> Tensor:
        """(batch * heads, Q, e) to (batch, Q, d), projected."""
        return self.out_proj(attended.unflatten(0, (-1, self.num_heads)).transpose(1, 2).flatten(2))


class ClusteredRCDA(RowColumnAttention):
    """A map's cells attend to clusters of them: a column's and a row's weights over the clusters, multiplied.

    `out[h, w] = W_o sum_m A_col[h, m] A_row[w, m] V[m]`, not normalised again. The five projections are of the
    clusters' row keys, their column keys, row queries, column queries and values: the other way round than in
    `MultiheadRCDA`, as released weights have it. Row queries are the map's W columns, averaged over the height.

    Modifications:
        - batches of two or more images keep their batch and row axes apart, which the reference mixes up.
    """

    def forward(
        self,
        query_row: Tensor,
        query_col: Tensor,
        clusters_row: Tensor,
        clusters_col: Tensor,
        clusters: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query_row: (batch, W, d), the map's mean over its rows, with the embedding of x.
            query_col: (batch, H, d), its mean over its columns, with the embedding of y.
            clusters_row, clusters_col: (batch, M, d), clusters with the embeddings of their cells' x and y.
            clusters: (batch, M, d).
            mask: bool (batch, M), True where an image has no such cluster.

        Returns:
            (batch, H, W, d).
        """
        row_key, col_key, row_query, col_query, values = self.projections()
        row_clusters, col_clusters = F.linear(clusters_row, *row_key), F.linear(clusters_col, *col_key)
        row = self.weights(F.linear(query_row, *row_query), row_clusters, mask)  # (batch * heads, W, M)
        col = self.weights(F.linear(query_col, *col_query), col_clusters, mask)  # (batch * heads, H, M)
        v = self.heads(F.linear(clusters, *values)).flatten(0, 1)  # (batch * heads, M, e)
        attended = clustered_row_column_product(col, row, v)  # (batch * heads, H, W, e)
        attended = attended.unflatten(0, (-1, self.num_heads)).permute(0, 2, 3, 1, 4)  # (batch, H, W, heads, e)
        return self.out_proj(attended.flatten(3))
