"""Row-column decoupled attention, plain (Wang et al., "Anchor DETR", AAAI 2022, section 3.4) and over the clusters of
ENACT (Savathrakis and Argyros, arXiv:2409.07541).

The attention weight of a cell is the product of the weights of its column and its row. The full products are never
stored: see `row_column_product`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enact_common.attention.kernels import AUTO, check_kernels

from .row_column_product import clustered_row_column_product, row_column_product


class RowColumnAttention(nn.Module):
    """Base class with five packed input projections, heads, and the output projection.

    Args:
        embed_dim: channels d; a multiple of num_heads.
        num_heads: attention heads.
        dropout: probability of dropping an attention weight of a row or column in training.
        kernels: as in `EntropyClustering`, for the product of the weights.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, kernels: str = AUTO):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.kernels = check_kernels(kernels)
        self.in_proj_weight = nn.Parameter(torch.empty(5 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(5 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def projections(self) -> list[tuple[Tensor, Tensor]]:
        """Return (weight (d, d), bias (d,)) of all five; call it once per pass, since chunks cost backward time."""
        return list(zip(self.in_proj_weight.chunk(5), self.in_proj_bias.chunk(5), strict=True))

    def heads(self, x: Tensor) -> Tensor:
        """Split the heads: (batch, L, d) to (batch, heads, L, head_dim)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def weights(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute attention weights of queries (batch, L, d) over keys (batch, S, d): (batch * heads, L, S).

        Args:
            query, key: projected.
            mask: bool (batch, S), True where padded.
        """
        query, key = self.heads(query), self.heads(key)
        # Scale the keys, which are usually fewer than the queries.
        logits = query @ (key * key.shape[-1] ** -0.5).transpose(-2, -1)  # (batch, heads, L, S)
        if mask is not None:
            logits = logits.masked_fill(mask[:, None, None], -torch.inf)
        weights = F.dropout(logits.softmax(dim=-1), self.dropout, self.training)
        # Autocast computes softmax in float32; the following products run in the projections' precision.
        return weights.to(query.dtype).flatten(0, 1)


class MultiheadRCDA(RowColumnAttention):
    """Attention from queries to a map, by weights over its columns and weights over its rows.

    The five projections are those of row queries, column queries, row keys, column keys and values. "Row" means along a
    row: row keys are the map's W columns, averaged over the height.
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
        """Attend from queries to the map.

        Args:
            query: (batch, ..., d), contents.
            query_row_pos, query_col_pos: embeddings of the query's x and y; broadcast against the query.
            key_row: (batch, W, d), the map averaged over the height, plus the embedding of x.
            key_col: (batch, H, d), the map averaged over the width, plus the embedding of y.
            value: (batch, H, W, d).
            mask_row, mask_col: bool (batch, W) and (batch, H), True where padded.

        Returns:
            the query's shape.
        """
        row, col, v = self.factors(query, query_row_pos, query_col_pos, key_row, key_col, value, mask_row, mask_col)
        attended = row_column_product(row, col, v, self.kernels)  # (batch * heads, Q, head_dim)
        return self.join_heads(attended).view_as(query)

    def with_weights(self, query: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the result of `forward`, and the attention weights; for inspection, not for training.

        Args:
            query, others: as in `forward`.

        Returns:
            the query's shape; and (batch, heads, Q, H W), where the weights of each query add up to 1.
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
        """Return the product's factors for the arguments of `forward`: weights along rows (batch * heads, Q, W) and
        along columns (batch * heads, Q, H), and values (batch * heads, H, W, head_dim)."""
        query_row, query_col, row_key, col_key, values = self.projections()
        # Projections are linear: project contents and positions separately instead of adding them at full size.
        q_row = F.linear(query, *query_row) + F.linear(query_row_pos, query_row[0])
        q_col = F.linear(query, *query_col) + F.linear(query_col_pos, query_col[0])
        row = self.weights(q_row.flatten(1, -2), F.linear(key_row, *row_key), mask_row)  # (batch * heads, Q, W)
        col = self.weights(q_col.flatten(1, -2), F.linear(key_col, *col_key), mask_col)  # (batch * heads, Q, H)
        v = F.linear(value, *values).unflatten(-1, (self.num_heads, -1))  # (batch, H, W, heads, head_dim)
        return row, col, v.permute(0, 3, 1, 2, 4).flatten(0, 1)

    def join_heads(self, attended: Tensor) -> Tensor:
        """Join the heads and project: (batch * heads, Q, head_dim) to (batch, Q, d)."""
        return self.out_proj(attended.unflatten(0, (-1, self.num_heads)).transpose(1, 2).flatten(2))


class ClusteredRCDA(RowColumnAttention):
    """Attention from a map's cells to clusters: the weights of a cell's column and of its row, multiplied.

    `out[h, w] = W_o sum_m A_col[h, m] A_row[w, m] V[m]`; the products are not normalised again. The five projections
    are those of the clusters' row keys and column keys, row queries, column queries and values. This order differs from
    `MultiheadRCDA`, to fit released weights. Row queries are the map's W columns, averaged over the height.

    Modifications:
        - batch and row axes stay apart; the reference mixes them in batches of two or more images.
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
        """Attend from the map's cells to the clusters.

        Args:
            query_row: (batch, W, d), the map averaged over the height, plus the embedding of x.
            query_col: (batch, H, d), the map averaged over the width, plus the embedding of y.
            clusters_row, clusters_col: (batch, M, d), clusters plus the pooled embeddings of their cells' x and y.
            clusters: (batch, M, d).
            mask: bool (batch, M), True where an image has no such cluster.

        Returns:
            (batch, H, W, d).
        """
        row_key, col_key, row_query, col_query, values = self.projections()
        row_clusters, col_clusters = F.linear(clusters_row, *row_key), F.linear(clusters_col, *col_key)
        row = self.weights(F.linear(query_row, *row_query), row_clusters, mask)  # (batch * heads, W, M)
        col = self.weights(F.linear(query_col, *col_query), col_clusters, mask)  # (batch * heads, H, M)
        v = self.heads(F.linear(clusters, *values)).flatten(0, 1)  # (batch * heads, M, head_dim)
        attended = clustered_row_column_product(col, row, v, self.kernels)  # (batch * heads, H, W, head_dim)
        attended = attended.unflatten(0, (-1, self.num_heads)).permute(0, 2, 3, 1, 4)  # (batch, H, W, heads, head_dim)
        return self.out_proj(attended.flatten(3))
