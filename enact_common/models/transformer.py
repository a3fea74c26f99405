"""The transformer that DETR (Carion et al., ECCV 2020) and Conditional DETR share; each adds its own decoder.

Positional encodings are added to queries and keys in every attention of the encoder.
"""

import torch
from torch import Tensor, nn

from enact_common.attention.clustering import EntropyClustering
from enact_common.attention.hilbert import HILBERT, ROWS, hilbert_permutations
from enact_common.attention.rivals.base import RivalSelfAttention
from enact_common.models.layers import TransformerEncoderLayer, attention_settings, clone_layers, encoder_self_attention


class TransformerEncoder(nn.Module):
    """A stack of encoder layers.

    Args:
        encoder_layer: the layer, which is copied.
        norm: applied to the result; None for none.
        order: one of `ORDERS`, the order of the tokens in the layers; clusters are stretches of it.
    """

    def __init__(self, encoder_layer: nn.Module, num_layers: int, norm: nn.Module | None = None, order: str = ROWS):
        super().__init__()
        self.order = order
        self.layers = clone_layers(encoder_layer, num_layers)
        self.norm = norm

    def forward(self, src: Tensor, key_padding_mask: Tensor, pos: Tensor, size: tuple[int, int]) -> Tensor:
        """Encode the tokens (N, batch, d) of a feature map, in row order, and return them in this shape and order.

        Args:
            src: (N, batch, d).
            key_padding_mask: bool (batch, N), True where padded.
            pos: (N, batch, d).
            size: height and width of the map, which has N cells.
        """
        if self.order == HILBERT:
            order, back = hilbert_permutations(*size, src.device)
            src, pos = src.index_select(0, order), pos.index_select(0, order)
            key_padding_mask = key_padding_mask.index_select(1, order)
        for layer in self.layers:
            src = layer(src, key_padding_mask=key_padding_mask, pos=pos, size=size)
        if self.norm is not None:
            src = self.norm(src)
        return src.index_select(0, back) if self.order == HILBERT else src


class Transformer(nn.Module):
    """Encodes a feature map and decodes object queries from it.

    Args:
        encoder: has the call signature of `TransformerEncoder`.
        decoder: takes the queries' content and the memory (both length first), the padding mask (batch, N), and the
            positions of the memory and of the queries.
        d_model: channels d.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, d_model: int):
        super().__init__()
        self.d_model = d_model
        self.encoder = encoder
        self.decoder = decoder
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        # The loop above has overwritten scores that start at zero.
        for module in encoder.modules():
            if isinstance(module, EntropyClustering | RivalSelfAttention):
                module.start_scores()

    def forward(self, src: Tensor, mask: Tensor, query_embed: Tensor, pos_embed: Tensor) -> tuple:
        """Encode a feature map and decode the queries.

        Args:
            src, pos_embed: (batch, d, h, w).
            mask: bool (batch, h, w), True where padded.
            query_embed: (Q, d).

        Returns:
            the decoder's output and, for heads that use the map, the memory (batch, d, h, w).
        """
        batch, _, h, w = src.shape
        tokens = src.flatten(2).permute(2, 0, 1)  # (batch, d, h, w) -> (h w, batch, d)
        pos = pos_embed.flatten(2).permute(2, 0, 1)  # (h w, batch, d)
        padded = mask.flatten(1)  # (batch, h w)
        query_pos = query_embed.unsqueeze(1).expand(-1, batch, -1)  # (Q, batch, d)

        memory = self.encoder(tokens, padded, pos, (h, w))  # (h w, batch, d)
        decoded = self.decoder(torch.zeros_like(query_pos), memory, padded, pos, query_pos)
        return decoded, memory.permute(1, 2, 0).unflatten(2, (h, w))


def build_encoder(args, normalize_before: bool) -> TransformerEncoder:
    """Build the encoder from the arguments; `--pre_norm` adds a norm after the last layer."""
    layer = TransformerEncoderLayer(
        encoder_self_attention(
            args.encoder_attention, args.hidden_dim, args.nheads, args.dropout, attention_settings(args)
        ),
        args.hidden_dim,
        args.dim_feedforward,
        args.dropout,
        normalize_before,
    )
    # Only ENACT's clusters depend on the order of tokens.
    order = (getattr(args, "enact_order", None) or ROWS) if args.encoder_attention == "enact" else ROWS
    return TransformerEncoder(layer, args.enc_layers, nn.LayerNorm(args.hidden_dim) if args.pre_norm else None, order)
