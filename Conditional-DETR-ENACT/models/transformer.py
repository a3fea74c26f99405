"""Conditional DETR's transformer (Meng et al., "Conditional DETR for Fast Training Convergence", ICCV 2021).

The encoder is DETR's, clustered or plain. In the decoder's attention to the memory, content and position of a query are
concatenated, so contents are compared with contents and positions with positions. The previous layer's content scales
the position's encoding (the paper's conditional spatial query, section 3.3).

Modifications:
    - pre-norm works in the decoder and the encoder, also with ENACT; the reference fails with it.
"""

import torch
from torch import Tensor, nn

from enact_common.models.layers import MLP, DecoderLayer
from enact_common.models.transformer import Transformer, TransformerEncoder, build_encoder

from .attention import MultiheadAttention
from .position_encoding import encode_points

__all__ = ["Transformer", "TransformerDecoder", "TransformerDecoderLayer", "TransformerEncoder", "build_transformer"]


class TransformerDecoderLayer(DecoderLayer):
    """Self-attention among the queries, conditional attention to the memory, and a feed-forward network.

    Args:
        d_model, nhead: channels d and attention heads.
        dim_feedforward, dropout, normalize_before: as in `DecoderLayer`; dropout also applies to attention weights.
        first: this is the first layer, which has no content yet: it adds the learned query to the content.
    """

    COMPILED = ("forward",)
    MEMORY_ATTENTION = "cross_attn"

    def __init__(
        self, d_model: int, nhead: int, dim_feedforward: int, dropout: float, normalize_before: bool, first: bool
    ):
        super().__init__(d_model, dim_feedforward, dropout, normalize_before)
        self.nhead = nhead
        self.sa_qcontent_proj = nn.Linear(d_model, d_model)
        self.sa_qpos_proj = nn.Linear(d_model, d_model)
        self.sa_kcontent_proj = nn.Linear(d_model, d_model)
        self.sa_kpos_proj = nn.Linear(d_model, d_model)
        self.sa_v_proj = nn.Linear(d_model, d_model)
        self.self_attn = MultiheadAttention(d_model, nhead, dropout)

        self.ca_qcontent_proj = nn.Linear(d_model, d_model)
        self.ca_qpos_proj = nn.Linear(d_model, d_model) if first else None
        self.ca_kcontent_proj = nn.Linear(d_model, d_model)
        self.ca_kpos_proj = nn.Linear(d_model, d_model)
        self.ca_v_proj = nn.Linear(d_model, d_model)
        self.ca_qpos_sine_proj = nn.Linear(d_model, d_model)
        self.cross_attn = MultiheadAttention(d_model, nhead, dropout)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        pos: Tensor,
        key_padding_mask: Tensor | None,
        query_pos: Tensor,
        query_sine_embed: Tensor,
    ) -> Tensor:
        """Run the layer.

        Args:
            tgt: (Q, batch, d).
            memory: (N, batch, d).
            pos: (N, batch, d), the memory's positions.
            key_padding_mask: bool (batch, N), True where padded.
            query_pos: (Q, batch, d), the learned queries.
            query_sine_embed: (Q, batch, d), the conditional spatial queries.

        Returns:
            (Q, batch, d).
        """

        def attend_queries(x):
            query = self.sa_qcontent_proj(x) + self.sa_qpos_proj(query_pos)
            key = self.sa_kcontent_proj(x) + self.sa_kpos_proj(query_pos)
            return self.self_attn(query, key, self.sa_v_proj(x))

        def attend_memory(x):
            query, key = self.ca_qcontent_proj(x), self.ca_kcontent_proj(memory)
            key_pos = self.ca_kpos_proj(pos)
            if self.ca_qpos_proj is not None:
                query, key = query + self.ca_qpos_proj(query_pos), key + key_pos
            query = self.side_by_side(query, self.ca_qpos_sine_proj(query_sine_embed))  # (Q, batch, 2 d)
            key = self.side_by_side(key, key_pos)  # (N, batch, 2 d)
            return self.cross_attn(query, key, self.ca_v_proj(memory), key_padding_mask)

        return self.run_blocks(tgt, attend_queries, attend_memory)

    def side_by_side(self, content: Tensor, pos: Tensor) -> Tensor:
        """Concatenate content and position of each head: two (L, batch, d) to (L, batch, 2 d)."""
        # (L, batch, heads, head_dim)
        heads = (tensor.unflatten(-1, (self.nhead, -1)) for tensor in (content, pos))
        return torch.cat(tuple(heads), dim=-1).flatten(-2)


class TransformerDecoder(nn.Module):
    """A stack of decoder layers with learned reference points; returns the output of each layer.

    Args:
        d_model: channels d.
        nhead: attention heads.
        num_layers: number of layers, at least 1.
        dim_feedforward, dropout, normalize_before: as in `TransformerDecoderLayer`.
    """

    def __init__(
        self, d_model: int, nhead: int, num_layers: int, dim_feedforward: int, dropout: float, normalize_before: bool
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerDecoderLayer(d_model, nhead, dim_feedforward, dropout, normalize_before, first=i == 0)
            for i in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model)
        self.query_scale = MLP(d_model, d_model, d_model, 2)
        # The first layer does not use it, so a single layer would leave it without gradients.
        self.query_scale.requires_grad_(num_layers > 1)
        self.ref_point_head = MLP(d_model, d_model, 2, 2)

    def forward(
        self, tgt: Tensor, memory: Tensor, key_padding_mask: Tensor | None, pos: Tensor, query_pos: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Decode the queries.

        Args:
            tgt, query_pos: (Q, batch, d).
            memory, pos: (N, batch, d).
            key_padding_mask: bool (batch, N), True where padded.

        Returns:
            the layers' outputs (layers, batch, Q, d), and the reference points (batch, Q, 2), (x, y) in [0, 1].
        """
        points = self.ref_point_head(query_pos).float().sigmoid()  # (Q, batch, 2)
        spatial = encode_points(points, tgt.shape[-1]).to(tgt.dtype)  # (Q, batch, d)
        outputs = []
        for layer in self.layers:
            conditional = spatial * self.query_scale(tgt) if outputs else spatial
            tgt = layer(tgt, memory, pos, key_padding_mask, query_pos, conditional)
            outputs.append(tgt)
        return self.norm(torch.stack(outputs)).transpose(1, 2), points.transpose(0, 1)


def build_transformer(args) -> Transformer:
    """Build the transformer from the arguments."""
    decoder = TransformerDecoder(
        args.hidden_dim, args.nheads, args.dec_layers, args.dim_feedforward, args.dropout, args.pre_norm
    )
    return Transformer(build_encoder(args, normalize_before=args.pre_norm), decoder, args.hidden_dim)
