"""DETR's transformer (Carion et al., ECCV 2020), with clustered or plain self-attention in its encoder.

Positional encodings are added to queries and keys in every attention; the decoder returns the output of each layer.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enact_common.layers import TransformerEncoderLayer, clone_layers, encoder_self_attention


class TransformerEncoder(nn.Module):
    """A stack of encoder layers.

    Args:
        encoder_layer: the layer, copied.
        num_layers: how many.
        norm: applied to the result; None for none.
    """

    def __init__(self, encoder_layer: nn.Module, num_layers: int, norm: nn.Module | None = None):
        super().__init__()
        self.layers = clone_layers(encoder_layer, num_layers)
        self.norm = norm

    def forward(self, src: Tensor, key_padding_mask: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        """(N, batch, d) to (N, batch, d); key_padding_mask (batch, N), pos (N, batch, d)."""
        for layer in self.layers:
            src = layer(src, key_padding_mask=key_padding_mask, pos=pos)
        return src if self.norm is None else self.norm(src)


class TransformerDecoderLayer(nn.Module):
    """Self-attention among the queries, attention to the encoder's memory, and a feed-forward network.

    Args:
        d_model: channels d.
        nhead: attention heads.
        dim_feedforward: hidden channels of the feed-forward network.
        dropout: probability, in and after every block.
        normalize_before: pre-norm in place of post-norm.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        normalize_before: bool = False,
    ):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.multihead_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)
        self.normalize_before = normalize_before

    def forward(
        self, tgt: Tensor, memory: Tensor, memory_key: Tensor, key_padding_mask: Tensor | None, query_pos: Tensor
    ) -> Tensor:
        """One layer.

        Args:
            tgt: (Q, batch, d).
            memory: (N, batch, d), the values to attend to.
            memory_key: (N, batch, d), the memory with its positions added.
            key_padding_mask: bool (batch, N), True where padded.
            query_pos: (Q, batch, d).

        Returns:
            (Q, batch, d).
        """

        def attend_queries(x):
            placed = x + query_pos
            return self.dropout1(self.self_attn(placed, placed, value=x, need_weights=False)[0])

        def attend_memory(x):
            attended = self.multihead_attn(
                x + query_pos, memory_key, value=memory, key_padding_mask=key_padding_mask, need_weights=False
            )
            return self.dropout2(attended[0])

        def feed_forward(x):
            return self.dropout3(self.linear2(self.dropout(F.relu(self.linear1(x)))))

        blocks = ((attend_queries, self.norm1), (attend_memory, self.norm2), (feed_forward, self.norm3))
        for block, norm in blocks:
            tgt = tgt + block(norm(tgt)) if self.normalize_before else norm(tgt + block(tgt))
        return tgt


class TransformerDecoder(nn.Module):
    """A stack of decoder layers that returns what each of them gives.

    Args:
        decoder_layer: the layer, copied.
        num_layers: how many.
        norm: applied to the output of every layer.
    """

    def __init__(self, decoder_layer: nn.Module, num_layers: int, norm: nn.Module):
        super().__init__()
        self.layers = clone_layers(decoder_layer, num_layers)
        self.norm = norm

    def forward(
        self, tgt: Tensor, memory: Tensor, key_padding_mask: Tensor | None, pos: Tensor, query_pos: Tensor
    ) -> Tensor:
        """tgt and query_pos (Q, batch, d), memory and pos (N, batch, d) give (layers, Q, batch, d)."""
        memory_key = memory + pos
        outputs = []
        for layer in self.layers:
            tgt = layer(tgt, memory, memory_key, key_padding_mask, query_pos)
            outputs.append(tgt)
        return self.norm(torch.stack(outputs))


class Transformer(nn.Module):
    """DETR's transformer.

    Args:
        d_model: channels d.
        nhead: attention heads.
        num_encoder_layers, num_decoder_layers: layers.
        dim_feedforward: hidden channels of the feed-forward networks.
        dropout: probability.
        normalize_before: pre-norm in place of post-norm.
        encoder_attention: "enact" or "mhsa".
        sigma: of the entropy's smoothing, tokens.

    Modifications:
        - with ENACT, the encoder layers are post-norm even where `normalize_before` asks for pre-norm; the norm
          after the encoder, which pre-norm brings, is still there. The reference computes it so.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        normalize_before: bool = False,
        encoder_attention: str = "enact",
        sigma: float = 3.0,
    ):
        super().__init__()
        self.d_model = d_model
        encoder_layer = TransformerEncoderLayer(
            encoder_self_attention(encoder_attention, d_model, nhead, dropout, sigma),
            d_model,
            dim_feedforward,
            dropout,
            normalize_before=normalize_before and encoder_attention == "mhsa",
        )
        encoder_norm = nn.LayerNorm(d_model) if normalize_before else None
        self.encoder = TransformerEncoder(encoder_layer, num_encoder_layers, encoder_norm)
        decoder_layer = TransformerDecoderLayer(d_model, nhead, dim_feedforward, dropout, normalize_before)
        self.decoder = TransformerDecoder(decoder_layer, num_decoder_layers, nn.LayerNorm(d_model))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, src: Tensor, mask: Tensor, query_embed: Tensor, pos_embed: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a feature map and decode the queries.

        Args:
            src: (batch, d, h, w).
            mask: bool (batch, h, w), True where padded.
            query_embed: (Q, d).
            pos_embed: (batch, d, h, w).

        Returns:
            the decoder layers' outputs (layers, batch, Q, d), and the memory (batch, d, h, w).
        """
        batch, _, h, w = src.shape
        tokens = src.flatten(2).permute(2, 0, 1)  # (batch, d, h, w) -> (h w, batch, d)
        pos = pos_embed.flatten(2).permute(2, 0, 1)  # (h w, batch, d)
        padded = mask.flatten(1)  # (batch, h w)
        query_pos = query_embed.unsqueeze(1).expand(-1, batch, -1)  # (Q, batch, d)

        memory = self.encoder(tokens, key_padding_mask=padded, pos=pos)  # (h w, batch, d)
        hs = self.decoder(torch.zeros_like(query_pos), memory, padded, pos, query_pos)  # (layers, Q, batch, d)
        return hs.transpose(1, 2), memory.permute(1, 2, 0).unflatten(2, (h, w))


def build_transformer(args) -> Transformer:
    """The transformer that the arguments ask for."""
    return Transformer(
        d_model=args.hidden_dim,
        nhead=args.nheads,
        num_encoder_layers=args.enc_layers,
        num_decoder_layers=args.dec_layers,
        dim_feedforward=args.dim_feedforward,
        dropout=args.dropout,
        normalize_before=args.pre_norm,
        encoder_attention=args.encoder_attention,
        sigma=args.smoothing_sigma,
    )
