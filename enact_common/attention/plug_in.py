"""ENACT's attention in somebody else's detector, with the weights that it has.

Two kinds of attention can be replaced: `torch.nn.MultiheadAttention`, wherever it stands, and the self-attention of
Hugging Face's DETR and Conditional DETR. Classes of `transformers` are known by name, so nothing here imports it.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .conversion import PACKED, clustered_weights
from .layer import EnactSelfAttention

# By module and class: `DetrAttention` up to transformers 4, the others in 5.
HUGGING_FACE = {
    f"transformers.models.{model}.modeling_{model}.{name}"
    for model, names in {
        "detr": ("DetrAttention", "DetrSelfAttention"),
        "conditional_detr": ("DetrAttention", "ConditionalDetrSelfAttention"),
    }.items()
    for name in names
}

Where = str | re.Pattern | Callable[[str, nn.Module], bool]


class HuggingFaceSelfAttention(EnactSelfAttention):
    """`EnactSelfAttention`, called as the self-attention of Hugging Face's DETR and Conditional DETR is.

    Batch first always. Arguments, parameters and buffers are those of `EnactSelfAttention`.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        object_queries: Tensor | None = None,
        **others,
    ) -> tuple[Tensor, None]:
        """Attend from every token to the clusters of all.

        Args:
            hidden_states: (batch, N, d), N in row-major order of the feature map.
            attention_mask: of padded keys, as `padded_keys` takes it.
            position_embeddings: (batch, N, d), added to queries and keys but not to values.
            object_queries: what transformers 4 calls the position embeddings.
            others: what else the original takes, such as `output_attentions`; without effect.

        Returns:
            (output (batch, N, d), None): no weights, whatever `output_attentions` says.

        Raises:
            ValueError: it is called as a cross-attention, or with a mask of a form that is not known.
        """
        if others.get("key_value_states") is not None:
            raise ValueError("HuggingFaceSelfAttention stands for a self-attention: it takes no key_value_states")
        positions = object_queries if position_embeddings is None else position_embeddings
        placed = hidden_states if positions is None else hidden_states + positions
        return super().forward(placed, placed, hidden_states, key_padding_mask=padded_keys(attention_mask))


def padded_keys(attention_mask: Tensor | None) -> Tensor | None:
    """Where keys are padded, bool (batch, N), in a mask as the encoders of `transformers` hand it to their layers.

    Args:
        attention_mask: (batch, 1, N, N), the same for every query: boolean, True where attended to ("sdpa"), or added
            to the logits, negative where padded ("eager"). (batch, N), 0 where padded (flash attention). None: no
            padding.

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


def plug_in(
    module: nn.Module,
    sigma: float = 3.0,
    where: Where | None = None,
    *,
    clusters: str = "windows",
    per_image: bool = False,
    mask_padding: bool = False,
    max_clusters: int | None = None,
    temperature: float | None = None,
    scale_logits: bool = False,
) -> list[str]:
    """Replace the encoder self-attention of any model by ENACT's, in place, with the weights that it has.

    While each cluster is one token, the model computes what it did; from there on, clusters stand for their tokens.
    What scores the tokens, `W_prob`, starts untrained, so the model wants fine-tuning; it computes in float32, also
    where the model has a narrower type. All else is kept: weights, heads, dropout, device and dtype, what is trained
    and what is frozen, training or evaluation mode. Optimizers that hold the old weights know nothing of the new ones.

    The tokens must be the cells of a feature map in row-major order, in batches.

    Args:
        module: holds the attention somewhere below; an encoder or a whole model, so that PyTorch's `TransformerEncoder`
            can be told to pass no nested tensors.
        sigma: standard deviation of the information's smoothing, tokens.
        where: which attention modules to replace: a regular expression that the whole dotted name matches, or a
            function (name, module) -> bool. None for those which `in_encoder` finds and that can be replaced.
        clusters, per_image, mask_padding, max_clusters, temperature: as in `EntropyClustering`.
        scale_logits: as in `EnactSelfAttention`. It does not change what the model computes, but how it trains on.

    Returns:
        the names of the modules that were replaced, in the model's order.

    Raises:
        ValueError: there is nothing to replace, an attention cannot be replaced, or a setting is wrong. The model is
            then as it was.
    """
    found = attention_modules(module)
    chosen = choose(module, found, where)
    if not chosen:
        raise ValueError(nothing_chosen(module, found, where))
    reasons = {name: reason_against(attention, found, chosen) for name, attention in chosen.items()}
    refused = [f"{name} ({type(chosen[name]).__name__}): {reason}" for name, reason in reasons.items() if reason]
    if refused:
        raise ValueError(
            "\n  ".join(["cannot be replaced by ENACT's attention:", *refused])
            + "\nNothing was replaced. Name others with where, or leave these out."
        )

    settings = {
        "sigma": sigma,
        "clusters": clusters,
        "per_image": per_image,
        "mask_padding": mask_padding,
        "max_clusters": max_clusters,
        "temperature": temperature,
        "scale_logits": scale_logits,
    }
    # All are made before the first takes its place; an attention that layers share stays shared.
    unique = {id(attention): attention for attention in chosen.values()}
    made = {key: clustered(attention, settings) for key, attention in unique.items()}
    for name, attention in chosen.items():
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, made[id(attention)])
    for encoder in module.modules():
        # It decided at construction, by the attention that it then had, to pass padded batches as nested tensors.
        if isinstance(encoder, nn.TransformerEncoder) and any(
            isinstance(m, EnactSelfAttention) for m in encoder.modules()
        ):
            encoder.use_nested_tensor = False
    return list(chosen)


def attention_modules(module: nn.Module) -> dict[str, nn.Module]:
    """What is attention below a module, by its dotted name: what can be replaced, and what is named after attention.

    A module that stands in several places has several names.
    """
    return {
        name: part
        for name, part in module.named_modules(remove_duplicate=False)
        if name and (isinstance(part, nn.MultiheadAttention) or "attention" in type(part).__name__.lower())
    }


def choose(module: nn.Module, found: Mapping[str, nn.Module], where: Where | None) -> dict[str, nn.Module]:
    """Those of the attention modules found that `where`, as in `plug_in`, means."""
    if where is None:
        return {
            name: attention
            for name, attention in found.items()
            if (isinstance(attention, nn.MultiheadAttention) or is_hugging_face(attention)) and in_encoder(module, name)
        }
    if callable(where):
        return {name: attention for name, attention in found.items() if where(name, attention)}
    try:
        pattern = re.compile(where)
    except re.error as error:
        raise ValueError(f"where={where!r} is no regular expression: {error}") from error
    return {name: attention for name, attention in found.items() if pattern.fullmatch(name)}


def in_encoder(module: nn.Module, name: str) -> bool:
    """Whether the attention of that name is, by all names, the self-attention of an encoder.

    Of the modules around it, from the given one down, at least one is an encoder or a layer of one, and none is a
    decoder or a layer of one, by its attribute's name or its class's (base classes included); one that says both says
    nothing. The attention itself is not named after a cross-attention.
    """
    *path, last = name.split(".")
    encoder, around = False, module
    for attribute in ("", *path):
        around = getattr(around, attribute) if attribute else around
        words = " ".join((attribute, *(base.__name__ for base in type(around).__mro__))).lower()
        if "decoder" in words and "encoder" not in words:
            return False
        encoder |= "encoder" in words and "decoder" not in words
    return encoder and "cross" not in last.lower()


def is_hugging_face(attention: nn.Module) -> bool:
    """Whether this is a self-attention of Hugging Face's DETR or Conditional DETR."""
    return f"{type(attention).__module__}.{type(attention).__qualname__}" in HUGGING_FACE


def nothing_chosen(module: nn.Module, found: Mapping[str, nn.Module], where: Where | None) -> str:
    """The error where nothing is there to replace: what there is, and how to name it."""
    owner = type(module).__name__
    if isinstance(module, nn.MultiheadAttention) or is_hugging_face(module):
        return f"{owner} is an attention itself, which nothing can replace in place: pass the module that holds it"
    if not found:
        return f"{owner} has no attention: none of its modules is an nn.MultiheadAttention or named after attention"
    if where is None:
        what = f"{owner} has no encoder self-attention that is known as one"
    else:
        what = f"where={where!r} means none of the attention modules of {owner}"
    # Layers that differ in their numbers alone make one pattern, which can be passed as it stands.
    patterns = {
        (r"\d+".join(re.split(r"(?<![^.])\d+(?![^.])", name)), type(attention).__name__): None
        for name, attention in found.items()
    }
    listed = [f"{pattern} ({kind})" for pattern, kind in patterns]
    way_out = (
        "Say which to replace with where: a regular expression for the whole name, or a function of name and module."
    )
    if any(isinstance(attention, EnactSelfAttention) for attention in found.values()):
        way_out += " ENACT's own attention is in place already."
    return "\n  ".join([f"{what}. There are:", *listed]) + f"\n{way_out}"


def reason_against(attention: nn.Module, found: Mapping[str, nn.Module], chosen: Mapping[str, nn.Module]) -> str | None:
    """Why an attention cannot be replaced; None where it can.

    Args:
        attention: one of those chosen.
        found, chosen: all attention modules, and those that are to be replaced, by name.
    """
    if isinstance(attention, EnactSelfAttention):
        return "it is ENACT's already"
    if attention._forward_hooks or attention._forward_pre_hooks or "forward" in vars(attention):
        return "it has hooks, or a forward of its own, that would be lost"
    elsewhere = [other for other, same in found.items() if same is attention and other not in chosen]
    if elsewhere:
        return f"it is the same module as {elsewhere[0]}, which is not to be replaced"
    if is_hugging_face(attention):
        plain = all(type(layer) is nn.Linear for layer in projections(attention).values())
        return None if plain else "its projections are no plain nn.Linear (adapters, or quantised weights)"
    if type(attention) is not nn.MultiheadAttention:
        if isinstance(attention, nn.MultiheadAttention):
            return "a subclass of nn.MultiheadAttention may compute something else"
        return "it is neither nn.MultiheadAttention nor a self-attention of Hugging Face's DETR or Conditional DETR"
    if not attention._qkv_same_embed_dim:
        return "its keys or values have other channels than its queries (kdim, vdim)"
    out = attention.out_proj
    if type(out) not in (NonDynamicallyQuantizableLinear, nn.Linear) or out._forward_hooks or out._forward_pre_hooks:
        return "its output projection is no plain nn.Linear, or has hooks"
    if attention.bias_k is not None or attention.bias_v is not None:
        return "it appends learned tokens to keys and values (add_bias_kv)"
    if attention.add_zero_attn:
        return "it appends a token of zeros to keys and values (add_zero_attn)"
    return None


def projections(attention: nn.Module) -> dict[str, nn.Module]:
    """The four projections of a Hugging Face self-attention, under the names that ENACT gives them."""
    out = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
    return {"W_q": attention.q_proj, "W_k": attention.k_proj, "W_v": attention.v_proj, "W_o": out}


def clustered(attention: nn.Module, settings: Mapping[str, Any]) -> EnactSelfAttention:
    """ENACT's attention with the weights of a plain one, which `reason_against` has nothing against.

    Args:
        attention: stays as it is.
        settings: of `EnactSelfAttention`, by name.
    """
    if is_hugging_face(attention):
        layers = projections(attention)
        embed_dim = layers["W_q"].in_features
        dropout = attention.attention_dropout if hasattr(attention, "attention_dropout") else attention.dropout
        new = HuggingFaceSelfAttention(
            embed_dim, embed_dim // attention.head_dim, dropout, batch_first=True, **settings
        )
        sources = {name: (layer.weight, layer.bias) for name, layer in layers.items()}
        (*inner, out) = sources.values()
        in_weight, in_bias = (None if None in parts else torch.cat(parts) for parts in zip(*inner, strict=True))
    else:
        heads, dropout, batch_first = attention.num_heads, attention.dropout, attention.batch_first
        new = EnactSelfAttention(attention.embed_dim, heads, dropout, batch_first=batch_first, **settings)
        joint = in_weight, in_bias = attention.in_proj_weight, attention.in_proj_bias
        out = attention.out_proj.weight, attention.out_proj.bias
        sources = {"W_q": joint, "W_k": joint, "W_v": joint, "W_o": out}

    packed = dict(zip(PACKED, (in_weight, in_bias, *out), strict=True))
    packed = {name: tensor for name, tensor in packed.items() if tensor is not None}
    for name, tensor in clustered_weights(packed, new.num_heads, new.scale_logits).items():
        layer, kind = name.split(".")
        source = sources[layer][kind == "bias"]
        # A bias that was not there is zero, and stays so.
        trained = source is not None and source.requires_grad
        setattr(new.get_submodule(layer), kind, nn.Parameter(tensor, requires_grad=trained))
    weight = new.W_q.weight
    precise = torch.promote_types(weight.dtype, torch.float32)
    new.W_prob.to(weight.device, precise)
    new.kernel = new.kernel.to(weight.device, precise)
    return new.train(attention.training)
