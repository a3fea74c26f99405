"""The self-attention classes of other libraries that `plug_in` replaces: how they are called, and their weights.

They are PyTorch's `nn.MultiheadAttention`, the encoder self-attention of Hugging Face's detectors, and the attention of
timm's vision transformers. Classes are recognised by name, so this file imports neither transformers nor timm.
"""

import inspect
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .conversion import PACKED
from .layer import EnactSelfAttention
from .map_tokens import MapTokens
from .rivals import RIVALS, RivalSelfAttention


def full_names(models: dict[str, tuple[str, ...]]) -> set[str]:
    """Return the full names of classes in Hugging Face's models, for a model's folder and its class names."""
    return {f"transformers.models.{model}.modeling_{model}.{name}" for model, names in models.items() for name in names}


# Encoder self-attention that adds position embeddings to queries and keys: names up to transformers 4, and in 5.
DETECTORS = full_names(
    {
        "detr": ("DetrAttention", "DetrSelfAttention"),
        "conditional_detr": ("DetrAttention", "ConditionalDetrSelfAttention"),
        "dab_detr": ("DetrAttention",),
        "table_transformer": ("TableTransformerAttention",),
        "rt_detr": ("RTDetrMultiheadAttention", "RTDetrSelfAttention"),
        "rt_detr_v2": ("RTDetrV2MultiheadAttention", "RTDetrV2SelfAttention"),
        "d_fine": ("DFineMultiheadAttention", "DFineSelfAttention"),
        "deimv2": ("Deimv2SelfAttention",),
    }
)
YOLOS = full_names({"yolos": ("YolosAttention", "YolosSdpaAttention")})
TIMM = {"timm.layers.attention.Attention", "timm.models.vision_transformer.Attention"}

# For messages.
SUPPORTED = "nn.MultiheadAttention nor the attention of a timm ViT or of a supported detector of Hugging Face"


def class_names(module: nn.Module) -> list[str]:
    """Return the full names of a module's class and its base classes, in order."""
    return [f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__]


def is_detectors(attention: nn.Module) -> bool:
    """Whether this is a self-attention of a Hugging Face detector that adds position embeddings (`DETECTORS`)."""
    return class_names(attention)[0] in DETECTORS


def is_vision_transformers(attention: nn.Module) -> bool:
    """Whether this is the attention of YOLOS, or of a timm vision transformer."""
    return class_names(attention)[0] in YOLOS | TIMM


def is_foreign(attention: nn.Module) -> bool:
    """Whether this is an attention of another library than PyTorch that can be replaced."""
    return is_detectors(attention) or is_vision_transformers(attention)


def known_tokens(model: nn.Module) -> MapTokens | None:
    """Return which tokens are the map's in a known vision transformer; None for any other module."""
    names = class_names(model)
    if "transformers.models.yolos.modeling_yolos.YolosModel" in names:
        return MapTokens(before=1, after=model.config.num_detection_tokens)
    if "timm.models.vision_transformer.VisionTransformer" in names:
        return MapTokens(before=model.num_prefix_tokens)
    if "torchvision.models.vision_transformer.VisionTransformer" in names:
        return MapTokens(before=1)
    return None


class HuggingFaceCall:
    """The call signature of the encoder self-attention in Hugging Face's DETR-like detectors, for a layer with that of
    `nn.MultiheadAttention`, batch first: the base class that comes next.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        object_queries: Tensor | None = None,
        **others,
    ) -> tuple[Tensor, None]:
        """Attend from every token to the clusters or reduced keys of all tokens.

        Args:
            hidden_states: (batch, N, d), N in row-major order of the feature map.
            attention_mask: the padding mask, in a form that `padded_keys` accepts.
            position_embeddings: (batch or 1, N, d), added to queries and keys but not to values.
            object_queries: the name of the position embeddings in DAB-DETR, Table Transformer and transformers 4.
            others: the original's other arguments, such as `output_attentions`; ignored.

        Returns:
            (output (batch, N, d), None): no weights, whatever `output_attentions` says.

        Raises:
            ValueError: it is called as a cross-attention, or the mask's form is unknown.
        """
        if others.get("key_value_states") is not None:
            raise ValueError(f"{type(self).__name__} is a self-attention: call it without key_value_states")
        positions = object_queries if position_embeddings is None else position_embeddings
        with_positions = hidden_states if positions is None else hidden_states + positions
        return super().forward(
            with_positions, with_positions, hidden_states, key_padding_mask=padded_keys(attention_mask)
        )


class HuggingFaceSelfAttention(HuggingFaceCall, EnactSelfAttention):
    """`EnactSelfAttention` with the call signature of Hugging Face's detectors. Arguments, parameters, buffers stay."""


# A class of each rival, an attribute of this file too, as pickle needs.
HUGGING_FACE_RIVALS = {
    kind: type(f"HuggingFace{rival.__name__}", (HuggingFaceCall, rival), {"__module__": __name__})
    for kind, rival in RIVALS.items()
}
globals().update({rival.__name__: rival for rival in HUGGING_FACE_RIVALS.values()})


class VisionTransformerSelfAttention(EnactSelfAttention):
    """`EnactSelfAttention` with the call signature of YOLOS's and timm's attention: tokens in, tokens out.

    Attributes:
        output_dropout: dropout of the output; it has no parameters.
        returns_tuple: whether a call returns a tuple, as YOLOS's attention does up to transformers 4.
    """

    returns_tuple = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.output_dropout = nn.Dropout(0.0)

    def forward(self, hidden_states: Tensor, *others, **named) -> Tensor | tuple[Tensor]:
        """Attend from every token to the map's clusters and the tokens beside the map.

        Args:
            hidden_states: (batch, N, d), N as `tokens` says.
            others, named: the original's other arguments: `output_attentions` is ignored, masks must be None.

        Returns:
            the output (batch, N, d), alone or in a tuple.

        Raises:
            ValueError: a mask is given.
        """
        given = [name for name, value in (*enumerate(others, 1), *named.items()) if isinstance(value, Tensor)]
        if given or named.get("is_causal"):
            raise ValueError(
                f"{type(self).__name__} attends to clusters and takes no masks: call it with hidden_states only, got a "
                f"value of argument {given[0] if given else 'is_causal'}"
            )
        output = self.output_dropout(super().forward(hidden_states, hidden_states, hidden_states)[0])
        return (output,) if self.returns_tuple else output


def padded_keys(attention_mask: Tensor | None) -> Tensor | None:
    """The padding mask, bool (batch, N), from a mask that an encoder of `transformers` passes to its layers.

    Args:
        attention_mask: (batch, 1, N, N), equal for all queries: either boolean, True where attended to ("sdpa"), or
            added to the logits, negative where padded ("eager"). Or (batch, N), 0 where padded (flash attention). Or
            None: no padding.

    Raises:
        ValueError: the mask has another form.
    """
    if attention_mask is None:
        return None
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4:
        row = attention_mask[:, 0, 0]
        return row < 0 if row.is_floating_point() else ~row.bool()
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return attention_mask == 0
    form = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
    raise ValueError(
        f"expected an attention mask (batch, 1, N, N) or (batch, N), got {form}; "
        'load the model with attn_implementation="sdpa" or "eager"'
    )


def projections(attention: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of an attention that `is_foreign`: `W_q`, `W_k`, `W_v`, or for timm `qkv`; and `W_o`."""
    if class_names(attention)[0] in TIMM:
        return {"qkv": attention.qkv, "W_o": attention.proj}
    if class_names(attention)[0] in YOLOS:
        inner = attention.attention
        return {"W_q": inner.query, "W_k": inner.key, "W_v": inner.value, "W_o": attention.output.dense}
    out = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
    return {"W_q": attention.q_proj, "W_k": attention.k_proj, "W_v": attention.v_proj, "W_o": out}


def fault_of_foreign(attention: nn.Module) -> str | None:
    """Return why an attention that `is_foreign` cannot be replaced; None if it can."""
    layers = projections(attention)
    if any(type(layer) is not nn.Linear for layer in layers.values()):
        return "its projections are not plain nn.Linear (adapters, or quantised weights)"
    if any(part._forward_hooks or part._forward_pre_hooks for part in attention.modules()):
        return "modules inside it have hooks, which would be lost"
    width = layers["W_o"].out_features
    if any(layer.in_features != width or layer.out_features % width for layer in layers.values()):
        return "its heads or its output have other channels than its input (pruned heads, attn_head_dim, dim_out)"
    inside = {name: getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm", "gate")}
    extra = [name for name, part in inside.items() if part is not None and not isinstance(part, nn.Identity)]
    return f"it has {', '.join(extra)}, which ENACT's attention has not" if extra else None


class PlainAttention(NamedTuple):
    """The settings that a replacement takes over from a plain attention.

    Attributes:
        embed_dim, num_heads, dropout, batch_first: as in `nn.MultiheadAttention`.
        packed: the tensors that `clustered_weights` takes.
        sources: the weight and the bias, or None, from which each of `W_q`, `W_k`, `W_v`, `W_o` comes.
    """

    embed_dim: int
    num_heads: int
    dropout: float
    batch_first: bool
    packed: dict[str, Tensor]
    sources: dict[str, tuple[Tensor, Tensor | None]]


def read_attention(attention: nn.Module) -> PlainAttention:
    """Read an attention that is `nn.MultiheadAttention` or `is_foreign`, and has no fault."""
    if not is_foreign(attention):
        layout = attention.embed_dim, attention.num_heads, attention.dropout, attention.batch_first
        inner = [(attention.in_proj_weight, attention.in_proj_bias)]
        out = attention.out_proj.weight, attention.out_proj.bias
    else:
        *inner, out = ((layer.weight, layer.bias) for layer in projections(attention).values())
        layout = out[0].shape[0], heads_of(attention), dropout_of(attention), True
    # timm's and PyTorch's three projections are one tensor.
    q, k, v = inner if len(inner) == 3 else inner * 3
    in_weight, in_bias = (None if None in parts else torch.cat(parts) for parts in zip(*inner, strict=True))
    packed = dict(zip(PACKED, (in_weight, in_bias, *out), strict=True))
    packed = {name: tensor for name, tensor in packed.items() if tensor is not None}
    return PlainAttention(*layout, packed, {"W_q": q, "W_k": k, "W_v": v, "W_o": out})


def heads_of(attention: nn.Module) -> int:
    """Return the heads of an attention that `is_foreign`."""
    if is_detectors(attention):
        return projections(attention)["W_q"].in_features // attention.head_dim
    return attention.num_heads if hasattr(attention, "num_heads") else attention.attention.num_attention_heads


def dropout_of(attention: nn.Module) -> float:
    """Return the dropout of the attention weights of an attention that `is_foreign`."""
    if is_detectors(attention):
        return attention.attention_dropout if hasattr(attention, "attention_dropout") else attention.dropout
    if class_names(attention)[0] in TIMM:
        return attention.attn_drop.p
    inner = attention.attention
    return inner.dropout_prob if hasattr(inner, "dropout_prob") else inner.dropout.p


def class_for(attention: nn.Module, kind: str) -> type[EnactSelfAttention] | type[RivalSelfAttention]:
    """Return the class that replaces an attention, with the same call signature; kind: as in `plug_in`."""
    if is_vision_transformers(attention):
        return VisionTransformerSelfAttention
    if is_detectors(attention):
        return HuggingFaceSelfAttention if kind == "enact" else HUGGING_FACE_RIVALS[kind]
    return EnactSelfAttention if kind == "enact" else RIVALS[kind]


def keep_output(attention: nn.Module, new: VisionTransformerSelfAttention) -> None:
    """Give the attention of a vision transformer the old one's dropout and form of output."""
    timm = class_names(attention)[0] in TIMM
    dropout = attention.proj_drop if timm else attention.output.dropout
    new.output_dropout.p = getattr(dropout, "p", 0.0)  # an identity has none
    # transformers 4 passes output_attentions down and expects a tuple.
    new.returns_tuple = not timm and "output_attentions" in inspect.signature(type(attention).forward).parameters
