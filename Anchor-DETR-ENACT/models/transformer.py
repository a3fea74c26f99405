"""Anchor DETR's transformer (Wang et al., "Anchor DETR: Query Design for Transformer-Based Object Detection", AAAI
2022), with clustered or plain attention in its encoder.

Maps stay (batch, H, W, d) in all layers. Queries are anchor points, each repeated for every pattern. Position
embeddings are computed only once, since all layers use the same positions.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enact_common.attention.clustering import EntropyClustering, autocast_dtype, weigh_channels
from enact_common.attention.clusters import Clusters
from enact_common.attention.hilbert import HILBERT
from enact_common.attention.kernels import AUTO
from enact_common.boxes import boxes_at_points
from enact_common.cli.checks import refuse_rivals_of_row_column_attention
from enact_common.models.layers import (
    MLP,
    PRIOR_LOGIT,
    attention_settings,
    clone_layers,
    clustering_settings,
    encoder_self_attention,
    map_keywords,
)
from enact_common.utils.acceleration import Recomputed
from enact_common.utils.errors import UserError

from .position_encoding import cell_centres, encode_coordinates, encode_points, grid_cells
from .row_column_decoupled_attention import ClusteredRCDA, MultiheadRCDA

# Values of `--attention_type`.
ROW_COLUMN, TOKENS = "RCDA", "nn.MultiheadAttention"


@dataclass
class RowColumnPositions:
    """Position embeddings for row-column attention.

    Attributes:
        x: (batch, W, d), embeddings of the map's columns.
        y: (batch, H, d), embeddings of its rows.
        mask: bool (batch, H, W), True where padded.
        query_x, query_y: (Q, d), embeddings of the anchor points' x and y.
    """

    x: Tensor
    y: Tensor
    mask: Tensor
    query_x: Tensor
    query_y: Tensor

    def rows(self, maps: Tensor, skip_padding: bool = False) -> Tensor:
        """Average maps (batch, H, W, d) over the height, and add the embedding of x: (batch, W, d).

        By default the mean includes padding, as in the published weights.
        """
        return self.average(maps, 1, skip_padding) + self.x

    def columns(self, maps: Tensor, skip_padding: bool = False) -> Tensor:
        """Average maps (batch, H, W, d) over the width, and add the embedding of y: (batch, H, d)."""
        return self.average(maps, 2, skip_padding) + self.y

    def average(self, maps: Tensor, dim: int, skip_padding: bool) -> Tensor:
        """The mean over one side of the maps, optionally without padding; 0 where only padding is left."""
        if not skip_padding:
            return maps.mean(dim=dim)
        present = (~self.mask).unsqueeze(-1)  # (batch, H, W, 1)
        return (maps * present).sum(dim=dim) / present.sum(dim=dim).clamp(min=1)


@dataclass
class TokenPositions:
    """Position embeddings for attention between single cells.

    Attributes:
        cells: (batch, H, W, d), embeddings of the cells.
        mask: bool (batch, H, W), True where padded.
        query: (Q, d), embeddings of the anchor points.
    """

    cells: Tensor
    mask: Tensor
    query: Tensor


class FFN(nn.Module):
    """A feed-forward network with its residual connection and layer norm.

    Args:
        d_model: channels d.
        d_ffn: hidden channels.
        dropout: probability, between the linear maps and at the end.
    """

    COMPILED = ("forward",)

    def __init__(self, d_model: int, d_ffn: int, dropout: float):
        super().__init__()
        self.linear1 = nn.Linear(d_model, d_ffn)
        self.dropout2 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(d_ffn, d_model)
        self.dropout3 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., d)."""
        return self.norm2(x + self.dropout3(self.linear2(self.dropout2(F.relu(self.linear1(x))))))


class TransformerEncoderLayerSpatial(Recomputed):
    """Self-attention within each map, and a feed-forward network: a base class, whose subclasses define `attend`.

    Args:
        self_attn: the attention.
        d_model: channels d.
        d_ffn: hidden channels of the feed-forward network.
        dropout: probability.
    """

    def __init__(self, self_attn: nn.Module, d_model: int, d_ffn: int, dropout: float):
        super().__init__()
        self.self_attn = self_attn
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.ffn = FFN(d_model, d_ffn, dropout)

    def forward(self, src: Tensor, positions: RowColumnPositions | TokenPositions) -> Tensor:
        """Run the layer on maps (batch, H, W, d), keeping their shape."""
        return self.ffn(self.norm1(src + self.dropout1(self.attend(src, positions))))

    def attend(self, src: Tensor, positions) -> Tensor:
        """Self-attention within maps (batch, H, W, d)."""
        raise NotImplementedError


class RowColumnEncoderLayer(TransformerEncoderLayerSpatial):
    """Encoder layer where cells attend to the map's rows and columns; `self_attn` is a `MultiheadRCDA`."""

    def attend(self, src: Tensor, positions: RowColumnPositions) -> Tensor:
        return self.self_attn(
            src,
            positions.x.unsqueeze(1),
            positions.y.unsqueeze(2),
            positions.rows(src),
            positions.columns(src),
            src,
            positions.mask[:, 0, :],
            positions.mask[:, :, 0],
        )


class MapClustering(EntropyClustering):
    """Entropy clustering of a map for row-column attention.

    The row keys are scored; row keys, column keys and values are pooled with the same weights. Keys are contents plus
    positions. Since scores and pooling are linear, contents and positions are pooled separately, positions at their own
    smaller size, and no layer computes or stores the sums.
    """

    def forward(
        self, src: Tensor, x: Tensor, y: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Pool a map's keys and values.

        Args:
            src: (batch, H, W, d), contents.
            x: (batch, W, d), position embeddings of the map's columns.
            y: (batch, H, d), position embeddings of its rows.
            mask: bool (batch, H, W), True where padded; None for no padding. Ignored unless `mask_padding`.

        Returns:
            row keys, column keys and values of the clusters, (batch, M, d) each, 1 <= M <= H W; and bool (batch, M),
            True where an image has no such cluster, or None if all images have M clusters.
        """
        height, width = src.shape[1:3]
        # Each cell's column and row. No modulo: ONNX supports it only for constants.
        column = torch.arange(width, device=src.device).expand(height, -1).flatten()  # (H W,)
        line = torch.arange(height, device=src.device).unsqueeze(1).expand(-1, width).flatten()
        narrow = src.to(autocast_dtype(src))
        mask = None if mask is None else mask.flatten(1)
        with torch.autocast(src.device.type, enabled=False):
            x_scores = weigh_channels(x, self.W_prob.weight.flatten())  # (batch, W)

            def pool() -> tuple[tuple[Tensor, ...], Clusters]:
                scores = self.score(src, narrow) + x_scores.unsqueeze(1)  # (batch, H, W)
                clusters = self.cluster_scores(scores.flatten(1), mask)
                content = clusters.pool(narrow.flatten(1, 2))
                return (content, clusters.pool_shared(x, column), clusters.pool_shared(y, line)), clusters

            inputs = src.flatten(1, 2), narrow.flatten(1, 2), x_scores
            (content, *pooled), clusters = self.prefer_kernels(inputs, mask, pool)()
            if len(pooled) == 1:
                # Triton's kernels return each cluster's weights of the columns and of the rows instead.
                weights = pooled[0].split((width, height), dim=2)
                pooled = [(w @ side.to(w.dtype)).to(side.dtype) for w, side in zip(weights, (x, y), strict=True)]
            row, col = (content + positions for positions in pooled)
        return row, col, content, clusters.padding_mask


class ClusteredEncoderLayer(TransformerEncoderLayerSpatial):
    """Encoder layer where cells attend to clusters of cells; `self_attn` is a `ClusteredRCDA`.

    Args:
        clustering: settings of `EntropyClustering` by name. With `mask_padding`, the averages of rows and columns also
            leave out padding.
    """

    def __init__(self, self_attn: nn.Module, d_model: int, d_ffn: int, dropout: float, clustering: Mapping[str, Any]):
        super().__init__(self_attn, d_model, d_ffn, dropout)
        self.ENACT = MapClustering(d_model, **clustering)

    def attend(self, src: Tensor, positions: RowColumnPositions) -> Tensor:
        skip = self.ENACT.mask_padding
        clusters = self.ENACT(src, positions.x, positions.y, positions.mask)
        return self.self_attn(positions.rows(src, skip), positions.columns(src, skip), *clusters)


class TokenEncoderLayer(TransformerEncoderLayerSpatial):
    """Encoder layer where cells attend to cells or clusters, by an `nn.MultiheadAttention` or alike, batch first."""

    def attend(self, src: Tensor, positions: TokenPositions) -> Tensor:
        with_pos = (src + positions.cells).flatten(1, 2)  # (batch, H W, d)
        keywords = {"key_padding_mask": positions.mask.flatten(1), "need_weights": False}
        keywords |= map_keywords(self.self_attn, src.shape[1:3])
        attended, _ = self.self_attn(with_pos, with_pos, src.flatten(1, 2), **keywords)
        return attended.view_as(src)


class TransformerEncoderLayerLevel(Recomputed):
    """Attention between the levels at each cell, and a feed-forward network.

    Args:
        d_model: channels d.
        d_ffn: hidden channels of the feed-forward network.
        dropout: probability.
        n_heads: attention heads.
        separate_images: attend only to the image's own levels; the reference attends to the levels of all images in
            the batch.
    """

    def __init__(self, d_model: int, d_ffn: int, dropout: float, n_heads: int, separate_images: bool):
        super().__init__()
        self.separate_images = separate_images
        self.self_attn_level = nn.MultiheadAttention(d_model, n_heads, dropout=dropout)
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.ffn = FFN(d_model, d_ffn, dropout)

    def forward(self, src: Tensor, level_embed: Tensor) -> Tensor:
        """Run the layer on maps (batch * levels, H, W, d), image by image, with level_embed (levels, d): same shape."""
        levels = len(level_embed)
        tokens = src.flatten(1, 2).unflatten(0, (-1, levels))  # (batch, levels, H W, d)
        with_pos = tokens + level_embed.unsqueeze(1)
        # Length first: the axis to attend over comes first, and the cells are nn.MultiheadAttention's batch.
        if self.separate_images:
            tokens, with_pos = (t.transpose(0, 1).flatten(1, 2) for t in (tokens, with_pos))  # (levels, batch H W, d)
        else:
            tokens, with_pos = (t.flatten(0, 1) for t in (tokens, with_pos))  # (batch levels, H W, d)
        attended, _ = self.self_attn_level(with_pos, with_pos, tokens, need_weights=False)
        if self.separate_images:
            attended = attended.unflatten(1, (len(src) // levels, -1)).transpose(0, 1)  # (batch, levels, H W, d)
        return self.ffn(self.norm1(src + self.dropout1(attended.reshape(src.shape))))


class TransformerDecoderLayer(Recomputed):
    """Self-attention between the queries, attention to the maps, and a feed-forward network: a base class, whose
    subclasses define how to attend to the maps.

    Args:
        cross_attn: the attention to the maps.
        d_model: channels d.
        d_ffn: hidden channels of the feed-forward network.
        dropout: probability.
        n_heads: attention heads.
        n_levels: maps per image.
        separate_images: combine each image's maps with its own queries. Otherwise, with several levels, images of a
            batch are mixed as in the reference, which orders queries level by level but maps image by image.
    """

    MEMORY_ATTENTION = "cross_attn"

    def __init__(
        self,
        cross_attn: nn.Module,
        d_model: int,
        d_ffn: int,
        dropout: float,
        n_heads: int,
        n_levels: int,
        separate_images: bool,
    ):
        super().__init__()
        self.cross_attn = cross_attn
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attn = nn.MultiheadAttention(d_model, n_heads, dropout=dropout, batch_first=True)
        self.dropout2 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.n_levels = n_levels
        self.separate_images = separate_images
        if n_levels > 1:
            self.level_fc = nn.Linear(d_model * n_levels, d_model)
        self.ffn = FFN(d_model, d_ffn, dropout)

    def forward(self, tgt: Tensor, query_pos: Tensor, maps: tuple[Tensor, ...], positions) -> Tensor:
        """Run the layer.

        Args:
            tgt: (batch, Q, d).
            query_pos: (Q, d), the anchor points' embedding.
            maps: the result of `prepare` for the encoder's maps.
            positions: position embeddings.

        Returns:
            (batch, Q, d).
        """
        with_pos = tgt + query_pos
        attended, _ = self.self_attn(with_pos, with_pos, tgt, need_weights=False)
        tgt = self.norm2(tgt + self.dropout2(attended))

        attended = self.attend_maps(self.for_levels(tgt), maps, positions)  # (batch levels, Q, d)
        if self.n_levels > 1:
            attended = attended.unflatten(0, (-1, self.n_levels)).permute(0, 2, 3, 1)  # (batch, Q, d, levels)
            attended = self.level_fc(attended.flatten(2))
        return self.ffn(self.norm1(tgt + self.dropout1(attended)))

    def for_levels(self, tgt: Tensor) -> Tensor:
        """Repeat queries (batch, Q, d) for each map: (batch * levels, Q, d)."""
        if self.separate_images:
            return tgt.repeat_interleave(self.n_levels, dim=0)
        return tgt.repeat(self.n_levels, 1, 1)

    @staticmethod
    def prepare(src: Tensor, positions) -> tuple[Tensor, ...]:
        """Prepare the keys and values of maps (batch * levels, H, W, d), which all layers share."""
        raise NotImplementedError

    def attend_maps(self, tgt: Tensor, maps: tuple[Tensor, ...], positions) -> Tensor:
        """Attend from queries (batch * levels, Q, d) to one map each."""
        raise NotImplementedError


class RowColumnDecoderLayer(TransformerDecoderLayer):
    """Decoder layer where queries attend to rows and columns; `cross_attn` is a `MultiheadRCDA`."""

    @staticmethod
    def prepare(src: Tensor, positions: RowColumnPositions) -> tuple[Tensor, ...]:
        """Return row keys (batch * levels, W, d), column keys (batch * levels, H, d) and the maps."""
        return positions.rows(src), positions.columns(src), src

    def attend_maps(self, tgt: Tensor, maps: tuple[Tensor, ...], positions: RowColumnPositions) -> Tensor:
        return self.cross_attn(
            tgt, positions.query_x, positions.query_y, *maps, positions.mask[:, 0, :], positions.mask[:, :, 0]
        )


class TokenDecoderLayer(TransformerDecoderLayer):
    """Decoder layer where queries attend to cells; `cross_attn` is an `nn.MultiheadAttention`, batch first."""

    @staticmethod
    def prepare(src: Tensor, positions: TokenPositions) -> tuple[Tensor, ...]:
        """Return keys and values, (batch * levels, H W, d) each."""
        return (src + positions.cells).flatten(1, 2), src.flatten(1, 2)

    def attend_maps(self, tgt: Tensor, maps: tuple[Tensor, ...], positions: TokenPositions) -> Tensor:
        return self.cross_attn(
            tgt + positions.query, *maps, key_padding_mask=positions.mask.flatten(1), need_weights=False
        )[0]


class Transformer(nn.Module):
    """Maps feature maps to the logits and boxes of every decoder layer.

    Args:
        d_model: channels d.
        nhead: attention heads.
        num_encoder_layers: number of layers; with several levels, half of them attend between levels.
        num_decoder_layers: number of layers.
        dim_feedforward: hidden channels of the feed-forward networks.
        dropout: probability.
        num_classes: labels, one logit each.
        num_feature_levels: maps per image, all of one size.
        num_query_position: anchor points; the grid uses the nearest square number.
        num_query_pattern: objects per anchor point.
        spatial_prior: "learned" or "grid", positions of the anchor points.
        attention_type: "RCDA" or "nn.MultiheadAttention", the attention to the maps.
        encoder_attention: "enact", "mhsa" (plain), or for attention between cells a name in `RIVALS`.
        settings: settings of the encoder's attention by name; for row-column attention those of `EntropyClustering`.
        separate_images: with several levels, keep the images of a batch apart, except in ENACT's window length; the
            reference mixes them.

    Modifications:
        - positions are embedded once, not in every layer; the prediction heads run once for all decoder layers;
        - with attention between cells, `adapt_pos1d` is frozen: checkpoints contain it, but nothing uses it.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        num_encoder_layers: int,
        num_decoder_layers: int,
        dim_feedforward: int,
        dropout: float,
        num_classes: int,
        num_feature_levels: int,
        num_query_position: int,
        num_query_pattern: int,
        spatial_prior: str,
        attention_type: str,
        encoder_attention: str,
        settings: Mapping[str, Any],
        separate_images: bool,
    ):
        super().__init__()
        self.d_model = d_model
        self.attention_type = attention_type
        sizes = (d_model, dim_feedforward, dropout)
        clustered = encoder_attention == "enact"
        if attention_type == TOKENS:
            attention = encoder_self_attention(encoder_attention, d_model, nhead, dropout, settings, batch_first=True)
            encoder_layer = TokenEncoderLayer(attention, *sizes)
            cross_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout, batch_first=True)
        else:
            kernels = settings.get("kernels", AUTO)
            attention = (ClusteredRCDA if clustered else MultiheadRCDA)(d_model, nhead, dropout, kernels)
            if clustered:
                encoder_layer = ClusteredEncoderLayer(attention, *sizes, settings)
            else:
                encoder_layer = RowColumnEncoderLayer(attention, *sizes)
            cross_attn = MultiheadRCDA(d_model, nhead, dropout, kernels)
        decoder_layer = (TokenDecoderLayer if attention_type == TOKENS else RowColumnDecoderLayer)(
            cross_attn, *sizes, nhead, num_feature_levels, separate_images
        )
        level_layer = TransformerEncoderLayerLevel(*sizes, nhead, separate_images)
        level_layers = num_encoder_layers // 2 if num_feature_levels > 1 else 0
        self.encoder_layers = clone_layers(encoder_layer, num_encoder_layers - level_layers)
        self.encoder_layers_level = clone_layers(level_layer, level_layers)
        self.decoder_layers = clone_layers(decoder_layer, num_decoder_layers)

        if num_feature_levels > 1:
            self.level_embed = nn.Embedding(num_feature_levels, d_model)
            # With at most one encoder layer, no layer attends between levels.
            self.level_embed.requires_grad_(level_layers > 0)
        self.pattern = nn.Embedding(num_query_pattern, d_model)
        self.spatial_prior = spatial_prior
        if spatial_prior == "learned":
            self.position = nn.Embedding(num_query_position, 2)
            nn.init.uniform_(self.position.weight)
        else:
            # Integers, which `model.bfloat16()` does not round: rounded points would be off by pixels.
            self.register_buffer("grid", grid_cells(num_query_position), persistent=False)
        self.num_queries = num_query_pattern * len(self.anchor_points())

        self.adapt_pos2d = nn.Sequential(nn.Linear(d_model, d_model), nn.ReLU(), nn.Linear(d_model, d_model))
        self.adapt_pos1d = nn.Sequential(nn.Linear(d_model, d_model), nn.ReLU(), nn.Linear(d_model, d_model))
        self.adapt_pos1d.requires_grad_(attention_type == ROW_COLUMN)

        class_embed = nn.Linear(d_model, num_classes)
        nn.init.constant_(class_embed.bias, PRIOR_LOGIT)
        bbox_embed = MLP(d_model, d_model, 4, 3)
        # Initially, boxes are small and centred at the anchor points.
        nn.init.zeros_(bbox_embed.layers[-1].weight)
        nn.init.zeros_(bbox_embed.layers[-1].bias)
        nn.init.constant_(bbox_embed.layers[-1].bias[2:], -2.0)
        # All decoder layers share one head, but checkpoints list it for each layer.
        self.class_embed = nn.ModuleList([class_embed] * num_decoder_layers)
        self.bbox_embed = nn.ModuleList([bbox_embed] * num_decoder_layers)

    def anchor_points(self) -> Tensor:
        """Return the anchor points (points, 2), (x, y) as fractions of the image's sides."""
        if self.spatial_prior == "learned":
            return self.position.weight
        return (self.grid + 0.5) / math.isqrt(len(self.grid))  # float32

    def forward(self, srcs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encode the maps and decode the queries.

        Args:
            srcs: (batch, levels, H, W, d).
            mask: bool (batch, H, W), True where padded.

        Returns:
            logits (layers, batch, Q, num_classes); boxes (layers, batch, Q, 4) cxcywh in [0, 1].
        """
        batch, levels = srcs.shape[:2]
        points = self.anchor_points().repeat(self.pattern.num_embeddings, 1)  # (Q, 2), pattern by pattern
        query_pos = self.adapt_pos2d(self.encode(encode_points, points))  # (Q, d)
        positions = self.embed_positions(mask.repeat_interleave(levels, dim=0), points, query_pos)

        maps = srcs.flatten(0, 1)  # (batch levels, H, W, d)
        for i, layer in enumerate(self.encoder_layers):
            maps = layer(maps, positions)
            if i < len(self.encoder_layers_level):
                maps = self.encoder_layers_level[i](maps, self.level_embed.weight)

        tgt = self.pattern.weight.repeat_interleave(len(points) // self.pattern.num_embeddings, dim=0)  # (Q, d)
        tgt = tgt.expand(batch, -1, -1)
        prepared = self.decoder_layers[0].prepare(maps, positions)
        outputs = []
        for layer in self.decoder_layers:
            tgt = layer(tgt, query_pos, prepared, positions)
            outputs.append(tgt)
        hs = torch.stack(outputs)  # (layers, batch, Q, d)
        # bf16 would shift boxes by pixels.
        with torch.autocast(hs.device.type, enabled=False):
            return self.class_embed[0](hs), boxes_at_points(points, self.bbox_embed[0](hs))

    def encode(self, encoding: Callable[[Tensor, int], Tensor], positions: Tensor) -> Tensor:
        """Encode positions at d channels; computed in float32, then cast to the weights' dtype."""
        return encoding(positions, self.d_model).to(self.pattern.weight.dtype)

    def embed_positions(self, mask: Tensor, points: Tensor, query_pos: Tensor) -> RowColumnPositions | TokenPositions:
        """Embed the positions of maps and queries.

        Args:
            mask: bool (batch * levels, H, W), True where padded.
            points: (Q, 2), anchor points.
            query_pos: (Q, d), the anchor points' two-dimensional embedding.
        """
        x, y = cell_centres(mask)  # (batch levels, W), (batch levels, H)
        if self.attention_type == TOKENS:
            cells = torch.stack(torch.broadcast_tensors(x.unsqueeze(1), y.unsqueeze(2)), dim=-1)  # (..., H, W, 2)
            return TokenPositions(self.adapt_pos2d(self.encode(encode_points, cells)), mask, query_pos)
        embedded = (self.adapt_pos1d(self.encode(encode_coordinates, c)) for c in (x, y, *points.unbind(-1)))
        x, y, query_x, query_y = embedded
        return RowColumnPositions(x, y, mask, query_x, query_y)


def build_transformer(args, num_classes: int) -> Transformer:
    """Build the transformer from the arguments.

    Raises:
        UserError: `--enact_order hilbert` with ENACT, which Anchor DETR does not support, or a rival of row-column
            attention.
    """
    # Models are also built from checkpoints, without the parser's checks.
    refuse_rivals_of_row_column_attention(args)
    if getattr(args, "enact_order", None) == HILBERT and args.encoder_attention == "enact":
        raise UserError(f"--enact_order {HILBERT}: Anchor DETR only clusters its maps row by row: leave it out")
    return Transformer(
        d_model=args.hidden_dim,
        nhead=args.nheads,
        num_encoder_layers=args.enc_layers,
        num_decoder_layers=args.dec_layers,
        dim_feedforward=args.dim_feedforward,
        dropout=args.dropout,
        num_classes=num_classes,
        num_feature_levels=args.num_feature_levels,
        num_query_position=args.num_query_position,
        num_query_pattern=args.num_query_pattern,
        spatial_prior=args.spatial_prior,
        attention_type=args.attention_type,
        encoder_attention=args.encoder_attention,
        settings=(attention_settings if args.attention_type == TOKENS else clustering_settings)(args),
        separate_images=args.separate_images,
    )
