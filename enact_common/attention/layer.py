"""ENACT's self-attention layer, with the call signature of `torch.nn.MultiheadAttention`.

Source: Savathrakis and Argyros, "ENACT: Entropy-based Clustering of Attention Input for Reducing the Computational
Needs of Object Detection Transformers", arXiv:2409.07541.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .clustering import WINDOWS, EntropyClustering, autocast_dtype
from .kernels import AUTO, failed_kernels, wants_triton
from .map_tokens import MapTokens
from .packed import PACKED_ATTENTION, is_packing, note_overflow, packed_attention


class EnactSelfAttention(EntropyClustering):
    """Multi-head attention whose keys and values are clustered by entropy before they are projected.

    `W_o(softmax(Q K^T) V / head_dim)` over M clusters instead of N keys. The (queries x clusters) matrix is never
    stored where `scaled_dot_product_attention` has a fused kernel; on CPUs it has none for a dropout above 0.

    Modifications of multi-head attention, as in the reference:
        - the logits are not scaled; the result is divided by head_dim after the softmax (unless `scale_logits`);
        - projections are four `nn.Linear`, so checkpoints have `W_q, W_k, W_v, W_o` instead of `in_proj`;
        - there are no attention weights or attention masks per token, since the keys are clusters.

    Args:
        embed_dim: channels d of queries, keys, values and output; a multiple of num_heads.
        num_heads: attention heads.
        dropout: probability of dropping an attention weight in training. The reference has none.
        sigma: standard deviation of the information's smoothing, tokens.
        batch_first: tensors are (batch, N, d) instead of (N, batch, d).
        clusters, per_image, mask_padding, max_clusters, temperature, kernels, zero_scores: as in
            `EntropyClustering`.
        scale_logits: scale the logits by head_dim^-0.5 and do not divide the values, as in plain attention. The
            published weights were trained without it; new trainings learn better with it (docs/results/accuracy.md).
        tokens: which keys are a feature map's. The others are not clustered: each stays a key. None: all are the map's.

    Attributes:
        weigh_by_size: weight each cluster in the softmax by its number of tokens; an ablation in `enact_common.study`.

    Raises:
        ValueError: embed_dim is not a multiple of num_heads, or a clustering setting is invalid.
    """

    weigh_by_size = False

    # Keeps `nn.TransformerEncoder` and its layer off their fused paths, which need packed projections.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        sigma: float = 3.0,
        batch_first: bool = False,
        clusters: str = "windows",
        per_image: bool = False,
        mask_padding: bool = False,
        max_clusters: int | None = None,
        temperature: float | None = None,
        scale_logits: bool = False,
        tokens: MapTokens | None = None,
        kernels: str = AUTO,
        zero_scores: bool = False,
    ):
        super().__init__(
            embed_dim,
            sigma,
            clusters,
            per_image,
            mask_padding,
            max_clusters,
            temperature,
            kernels=kernels,
            zero_scores=zero_scores,
        )
        if not isinstance(tokens, MapTokens | None):
            raise ValueError(f"tokens must be a MapTokens, such as MapTokens(before=1), got {tokens!r}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim ({embed_dim}) must be a multiple of num_heads ({num_heads})")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self.scale_logits = scale_logits
        self.tokens = tokens or MapTokens()
        self.W_q = nn.Linear(embed_dim, embed_dim)
        self.W_k = nn.Linear(embed_dim, embed_dim)
        self.W_v = nn.Linear(embed_dim, embed_dim)
        self.W_o = nn.Linear(embed_dim, embed_dim)

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
    ) -> tuple[Tensor, None]:
        """Attend from every query to the clusters of the keys.

        Args:
            query: (L, batch, d), or (batch, L, d) if batch_first.
            key, value: (N, batch, d), or (batch, N, d) if batch_first; N in row-major order of the feature map, with
                the tokens beside it that `tokens` names.
            key_padding_mask: bool (batch, N), True where padded; or floating point, minus infinity where padded, as
                `nn.TransformerEncoder` passes it. It has no effect without `mask_padding` or equal clusters: as in the
                reference, padded tokens are then clustered and attended to like any other.
            need_weights, attn_mask, is_causal: as in `nn.MultiheadAttention`; only these defaults are supported.
            average_attn_weights: ignored, since no weights are returned.

        Returns:
            (output, None); output has the query's shape.

        Raises:
            ValueError: weights or an attention mask are requested, or shapes do not fit.
        """
        if need_weights or attn_mask is not None or is_causal:
            raise ValueError(
                "EnactSelfAttention attends to clusters instead of tokens, so it returns no weights and takes no "
                "attention mask. Call it with need_weights=False, attn_mask=None, is_causal=False."
            )
        if query.ndim != 3 or query.is_nested:
            kind = "a nested tensor" if query.is_nested else tuple(query.shape)
            raise ValueError(f"EnactSelfAttention takes tensors of three axes, one of them the batch, got {kind}")
        if key_padding_mask is not None and key_padding_mask.is_floating_point():
            key_padding_mask = key_padding_mask.isneginf()
        head_dim = self.embed_dim // self.num_heads

        # Cast here instead of under autocast, so that the query projection and the pooling save the same tensor.
        cast = {id(tensor): tensor.to(autocast_dtype(tensor)) for tensor in (query, key, value)}
        scored, query, key, value = key, cast[id(query)], cast[id(key)], cast[id(value)]
        if not self.batch_first:
            scored, key, value = (tensor.transpose(0, 1) for tensor in (scored, key, value))
        tokens = self.tokens
        tokens.check(key.shape[1])
        padded = key_padding_mask if self.mask_padding else None
        finish = self.start_pooling(
            tokens.of_map(scored),
            tokens.of_map(value),
            key_padding_mask=None if padded is None else tokens.of_map(padded),
            narrow=tokens.of_map(key),
            packed=self.packs() and is_packing(),
        )
        q = self.W_q(query)  # before the end of the pooling, which may wait for the GPU
        pooled, clusters = finish()
        padding_mask = clusters.padding_mask
        sizes = clusters.sizes() if self.weigh_by_size else None
        if not tokens.all and not (padded is None and padding_mask is None and sizes is None):
            beside = torch.zeros_like(key[..., 0], dtype=torch.bool) if padded is None else padded  # (batch, N)
            sizes = None if sizes is None else tokens.rejoin((~beside).to(sizes.dtype), sizes)
            missing = torch.zeros(clusters.shape, dtype=torch.bool, device=key.device)
            padding_mask = tokens.rejoin(beside, missing if padding_mask is None else padding_mask)
        key, value = (tokens.rejoin(*parts) for parts in zip((key, value), pooled, strict=True))
        q, k, v = (x.unflatten(-1, (self.num_heads, head_dim)) for x in (q, self.W_k(key), self.W_v(value)))
        # Transpose after projections: transposed before, their inputs would be copied, and the copies kept.
        q = q if self.batch_first else q.transpose(0, 1)  # (batch, L, heads, head_dim)
        # The division by head_dim is linear in V, and V has M rows where the output has L.
        v, scale = (v, head_dim**-0.5) if self.scale_logits else (v / head_dim, 1.0)
        dropout = self.dropout if self.training else 0.0
        if getattr(clusters, "starts", None) is not None:
            note_overflow(clusters.overflow)
            # (batch, rows an image, heads, head_dim) -> (rows, heads, head_dim)
            attended = packed_attention(q, k.flatten(0, 1), v.flatten(0, 1), clusters.starts, dropout, scale)
            output = self.W_o(attended.flatten(2))  # (batch, L, d)
            return output if self.batch_first else output.transpose(0, 1), None
        bias = None if padding_mask is None else ~padding_mask[:, None, None]  # (batch, 1, 1, M)
        if sizes is not None:
            # log(0) is minus infinity, which masks missing clusters.
            bias = sizes.to(q.dtype).log()[:, None, None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (batch, heads, L or M, head_dim)
        attended = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=dropout, scale=scale)
        attended = attended.transpose(1, 2) if self.batch_first else attended.permute(2, 0, 1, 3)
        # (batch, L, heads, head_dim) or (L, batch, heads, head_dim) -> the query's shape
        return self.W_o(attended.flatten(2)), None

    def packs(self) -> bool:
        """Whether the layer packs its windows within `packed_windows`, for inputs that the kernels cover."""
        works = wants_triton(self.kernels) and PACKED_ATTENTION not in failed_kernels()
        return works and self.clusters == WINDOWS and self.tokens.all and not self.weigh_by_size

    def extra_repr(self) -> str:
        own = f"num_heads={self.num_heads}, dropout={self.dropout}" + ", scale_logits" * self.scale_logits
        own += "" if self.tokens.all else f", tokens={self.tokens}"
        return f"{own}, {super().extra_repr()}"
