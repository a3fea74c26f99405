"""DETR's transformer (Carion et al., ECCV 2020), with clustered or plain self-attention in its encoder.

Positional encodings are added to queries and keys in every attention; the decoder returns the output of each layer.
"""

import torch
from torch import Tensor, nn

from enact_common.models.layers import DecoderLayer, clone_layers
from enact_common.models.transformer import Transformer, TransformerEncoder, build_encoder

__all__ = ["Transformer", "TransformerDecoder", "TransformerDecoderLayer", "TransformerEncoder", "build_transformer"]


class TransformerDecoderLayer(DecoderLayer):
    """Self-attention among the queries, attention to the encoder's memory, and a feed-forward network.

    Args:
        d_model: channels d.
        nhead: attention heads.
        dim_feedforward: hidden channels of the feed-forward network.
        dropout: probability, after every block, inside the feed-forward network and for attention weights.
        normalize_before: use pre-norm instead of post-norm.
    """

    COMPILED = ("forward",)
    MEMORY_ATTENTION = "multihead_attn"

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        normalize_before: bool = False,
    ):
        super().__init__(d_model, dim_feedforward, dropout, normalize_before)
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.multihead_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)

    def forward(
        self, tgt: Tensor, memory: Tensor, memory_key: Tensor, key_padding_mask: Tensor | None, query_pos: Tensor
    ) -> Tensor:
        """Run the layer.

        Args:
            tgt: (Q, batch, d).
            memory: (N, batch, d), used as values.
            memory_key: (N, batch, d), the memory with its positions added.
            key_padding_mask: bool (batch, N), True where padded.
            query_pos: (Q, batch, d).

        Returns:
            (Q, batch, d).
        """

        def attend_queries(x):
            with_pos = x + query_pos
            return self.self_attn(with_pos, with_pos, value=x, need_weights=False)[0]

        def attend_memory(x):
            return self.multihead_attn(
                x + query_pos, memory_key, value=memory, key_padding_mask=key_padding_mask, need_weights=False
            )[0]

        return self.run_blocks(tgt, attend_queries, attend_memory)


class TransformerDecoder(nn.Module):
    """A stack of decoder layers that returns the output of each layer.

    Args:
        decoder_layer: the layer, which is copied.
        num_layers: the number of layers.
        norm: applied to the output of every layer.
    """

    def __init__(self, decoder_layer: nn.Module, num_layers: int, norm: nn.Module):
        super().__init__()
        self.layers = clone_layers(decoder_layer, num_layers)
        self.norm = norm

    def forward(
        self, tgt: Tensor, memory: Tensor, key_padding_mask: Tensor | None, pos: Tensor, query_pos: Tensor
    ) -> Tensor:
        """Decode tgt and query_pos (Q, batch, d) with memory and pos (N, batch, d): (layers, batch, Q, d)."""
        memory_key = memory + pos
        outputs = []
        for layer in self.layers:
            tgt = layer(tgt, memory, memory_key, key_padding_mask, query_pos)
            outputs.append(tgt)
        return self.norm(torch.stack(outputs)).transpose(1, 2)


def build_transformer(args) -> Transformer:
    """Build the transformer from the arguments.

    Modifications:
        - with ENACT, the encoder layers are post-norm even with `--pre_norm`, but the final norm that pre-norm adds
          after the encoder stays, as in the reference.
    """
    encoder = build_encoder(args, normalize_before=args.pre_norm and args.encoder_attention != "enact")
    layer = TransformerDecoderLayer(args.hidden_dim, args.nheads, args.dim_feedforward, args.dropout, args.pre_norm)
    decoder = TransformerDecoder(layer, args.dec_layers, nn.LayerNorm(args.hidden_dim))
    return Transformer(encoder, decoder, args.hidden_dim)
