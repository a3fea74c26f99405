"""Replace the attention in a third-party detector by ENACT's or a rival's, keeping its weights.

Two kinds can be replaced: `torch.nn.MultiheadAttention` anywhere, and the self-attention of Hugging Face's DETR and
Conditional DETR. Classes of `transformers` are recognised by name, so this file does not import it.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .conversion import PACKED, clustered_weights
from .layer import EnactSelfAttention
from .rivals import RIVALS, RivalSelfAttention

# Full class names: `DetrAttention` up to transformers 4, the others in 5.
HUGGING_FACE = {
    f"transformers.models.{model}.modeling_{model}.{name}"
    for model, names in {
        "detr": ("DetrAttention", "DetrSelfAttention"),
        "conditional_detr": ("DetrAttention", "ConditionalDetrSelfAttention"),
    }.items()
    for name in names
}

Where = str | re.Pattern | Callable[[str, nn.Module], bool]

# Base classes of the attention that `plug_in` puts in.
REPLACEMENTS = (EnactSelfAttention, RivalSelfAttention)


class HuggingFaceCall:
    """The call signature of the self-attention in Hugging Face's DETR and Conditional DETR, for a layer with that of
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
            position_embeddings: (batch, N, d), added to queries and keys but not to values.
            object_queries: the name of the position embeddings in transformers 4.
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
    """`EnactSelfAttention` with Hugging Face's call signature. Arguments, parameters and buffers stay."""


# A class of each rival, an attribute of this file too, as pickle needs.
HUGGING_FACE_RIVALS = {
    kind: type(f"HuggingFace{rival.__name__}", (HuggingFaceCall, rival), {"__module__": __name__})
    for kind, rival in RIVALS.items()
}
globals().update({rival.__name__: rival for rival in HUGGING_FACE_RIVALS.values()})


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


def plug_in(
    module: nn.Module,
    sigma: float = 3.0,
    where: Where | None = None,
    *,
    kind: str = "enact",
    clusters: str = "windows",
    per_image: bool = False,
    mask_padding: bool = False,
    max_clusters: int | None = None,
    temperature: float | None = None,
    scale_logits: bool = False,
    token_budget: int | None = None,
    map_size: tuple[int, int] | None = None,
) -> list[str]:
    """Replace the encoder self-attention of any model by ENACT's or a rival's, in place, keeping its weights.

    With ENACT, the result is exact while each cluster is one token; longer clusters approximate. `W_prob`, which scores
    the tokens, starts untrained, so fine-tune the model. `W_prob`, and what else a rival learns, is float32 even in a
    model of lower precision. Everything else is kept: weights, heads, dropout, device and dtype, `requires_grad`,
    training or evaluation mode. Make the optimizer afterwards: an existing one would still hold the old weights.

    The tokens must be the cells of a feature map in row-major order, in batches.

    Args:
        module: the model, or an encoder that holds the attention. In a PyTorch `TransformerEncoder` below it, nested
            tensors are switched off.
        sigma: standard deviation of the information's smoothing, tokens.
        where: which attention modules to replace: a regular expression that must match the whole dotted name, or a
            function (name, module) -> bool. None: the encoder self-attention (see `in_encoder`) of supported classes.
        kind: "enact", or a name in `RIVALS`.
        clusters, per_image, mask_padding, max_clusters, temperature: as in `EntropyClustering`.
        scale_logits: as in `EnactSelfAttention`. It does not change the model's output, but how it trains.
        token_budget, map_size: as in `RivalSelfAttention`. A kind that needs the map's size needs it here, unless the
            model passes `map_size` in its calls.

    Returns:
        the names of the replaced modules, in the model's order.

    Raises:
        ValueError: nothing matches, an attention cannot be replaced, or the kind or a setting is invalid, such as a
            setting of another kind. The model is then unchanged.
    """
    settings = settings_of_kind(
        kind,
        {
            "sigma": sigma,
            "clusters": clusters,
            "per_image": per_image,
            "mask_padding": mask_padding,
            "max_clusters": max_clusters,
            "temperature": temperature,
            "scale_logits": scale_logits,
            "token_budget": token_budget,
            "map_size": map_size,
        },
    )
    candidates = attention_modules(module)
    targets = select(module, candidates, where)
    if not targets:
        raise ValueError(no_match_message(module, candidates, where))
    reasons = {name: reason_against(attention, candidates, targets) for name, attention in targets.items()}
    refused = [f"{name} ({type(targets[name]).__name__}): {reason}" for name, reason in reasons.items() if reason]
    if refused:
        raise ValueError(
            "\n  ".join([f"{'ENACT' if kind == 'enact' else kind} cannot replace:", *refused])
            + "\nNothing was replaced. Exclude these, or choose others, with where."
        )

    # Make all before replacing any, so that an error leaves the model unchanged. Shared attention stays shared.
    unique = {id(attention): attention for attention in targets.values()}
    replacements = {key: replacement(attention, kind, settings) for key, attention in unique.items()}
    for name, attention in targets.items():
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, replacements[id(attention)])
    for encoder in module.modules():
        # At construction it chose, for the old attention, to pass padded batches as nested tensors.
        if isinstance(encoder, nn.TransformerEncoder) and any(isinstance(m, REPLACEMENTS) for m in encoder.modules()):
            encoder.use_nested_tensor = False
    return list(targets)


def attention_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Attention modules below a module, by dotted name: replaceable ones, and any with attention in the class name.

    A shared module is listed under each of its names.
    """
    return {
        name: part
        for name, part in module.named_modules(remove_duplicate=False)
        if name and (isinstance(part, nn.MultiheadAttention) or "attention" in type(part).__name__.lower())
    }


def select(module: nn.Module, candidates: Mapping[str, nn.Module], where: Where | None) -> dict[str, nn.Module]:
    """Return the attention modules that `where` selects, as in `plug_in`."""
    if where is None:
        return {
            name: attention
            for name, attention in candidates.items()
            if (isinstance(attention, nn.MultiheadAttention) or is_hugging_face(attention)) and in_encoder(module, name)
        }
    if callable(where):
        return {name: attention for name, attention in candidates.items() if where(name, attention)}
    try:
        pattern = re.compile(where)
    except re.error as error:
        raise ValueError(f"where={where!r} is not a valid regular expression: {error}") from error
    return {name: attention for name, attention in candidates.items() if pattern.fullmatch(name)}


def in_encoder(module: nn.Module, name: str) -> bool:
    """Whether the attention of that name is the self-attention of an encoder, judged by names.

    At least one module on the path to it must be an encoder or encoder layer, and none a decoder or decoder layer. The
    attribute's name and its class's (base classes included) count; a module whose names contain both words is ignored.
    The attention itself must not have "cross" in its name.
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


def no_match_message(module: nn.Module, candidates: Mapping[str, nn.Module], where: Where | None) -> str:
    """Return the error message when nothing matches: which attention there is, and how to select it."""
    owner = type(module).__name__
    if isinstance(module, nn.MultiheadAttention) or is_hugging_face(module):
        return f"{owner} is an attention itself and cannot be replaced in place: pass the module that holds it"
    if not candidates:
        return f"{owner} has no attention: no submodule is an nn.MultiheadAttention or has attention in its class name"
    if where is None:
        problem = f"{owner} has no encoder self-attention that can be recognised by name"
    else:
        problem = f"where={where!r} matches none of the attention modules of {owner}"
    # Names that differ only in their numbers make one pattern, which works as a value of where.
    patterns = {
        (r"\d+".join(re.split(r"(?<![^.])\d+(?![^.])", name)), type(attention).__name__): None
        for name, attention in candidates.items()
    }
    lines = [f"{pattern} ({kind})" for pattern, kind in patterns]
    advice = "Select modules with where: a regular expression for the whole name, or a function of name and module."
    if any(isinstance(attention, REPLACEMENTS) for attention in candidates.values()):
        advice += " Some are ENACT's attention or a rival's already."
    return "\n  ".join([f"{problem}. There are:", *lines]) + f"\n{advice}"


def reason_against(
    attention: nn.Module, candidates: Mapping[str, nn.Module], targets: Mapping[str, nn.Module]
) -> str | None:
    """Return why an attention cannot be replaced; None if it can.

    Args:
        attention: one of the targets.
        candidates, targets: all attention modules, and those to replace, by name.
    """
    if isinstance(attention, REPLACEMENTS):
        return "it is ENACT's attention or a rival's already"
    if attention._forward_hooks or attention._forward_pre_hooks or "forward" in vars(attention):
        return "it has hooks or a forward on the instance, which would be lost"
    elsewhere = [other for other, same in candidates.items() if same is attention and other not in targets]
    if elsewhere:
        return f"it is the same module as {elsewhere[0]}, which is not selected"
    if is_hugging_face(attention):
        plain = all(type(layer) is nn.Linear for layer in projections(attention).values())
        return None if plain else "its projections are not plain nn.Linear (adapters, or quantised weights)"
    if type(attention) is not nn.MultiheadAttention:
        if isinstance(attention, nn.MultiheadAttention):
            return "a subclass of nn.MultiheadAttention may compute something else"
        return "it is neither nn.MultiheadAttention nor a self-attention of Hugging Face's DETR or Conditional DETR"
    if not attention._qkv_same_embed_dim:
        return "its keys or values have other channels than its queries (kdim, vdim)"
    out = attention.out_proj
    if type(out) not in (NonDynamicallyQuantizableLinear, nn.Linear) or out._forward_hooks or out._forward_pre_hooks:
        return "its output projection is not a plain nn.Linear, or has hooks"
    if attention.bias_k is not None or attention.bias_v is not None:
        return "it appends learned tokens to keys and values (add_bias_kv)"
    if attention.add_zero_attn:
        return "it appends a token of zeros to keys and values (add_zero_attn)"
    return None


def projections(attention: nn.Module) -> dict[str, nn.Module]:
    """Return the four projections of a Hugging Face self-attention, by the names in `EnactSelfAttention`."""
    out = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
    return {"W_q": attention.q_proj, "W_k": attention.k_proj, "W_v": attention.v_proj, "W_o": out}


def settings_of_kind(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a kind of attention has.

    Args:
        kind: see `plug_in`.
        settings: all settings of `plug_in`, by name.

    Raises:
        ValueError: the kind is unknown, or a setting of another kind differs from its default.
    """
    if kind == "enact":
        own = set(inspect.signature(EnactSelfAttention).parameters)
    elif kind in RIVALS:
        rival = RIVALS[kind]
        own = {name for name, has in (("token_budget", rival.takes_budget), ("map_size", rival.needs_map_size)) if has}
    else:
        raise ValueError(f"kind={kind!r}: choose from enact, {', '.join(RIVALS)}")
    defaults = inspect.signature(plug_in).parameters
    for name, value in settings.items():
        if name not in own and value != defaults[name].default:
            raise ValueError(f"{name}={value!r} has no effect with kind={kind!r}: leave it out")
    return {name: value for name, value in settings.items() if name in own}


def replacement(
    attention: nn.Module, kind: str, settings: Mapping[str, Any]
) -> EnactSelfAttention | RivalSelfAttention:
    """The attention of a kind, with the weights of a plain one that `reason_against` accepts.

    Args:
        attention: is not changed.
        kind: see `plug_in`.
        settings: arguments of the kind's class, by name.
    """
    enact = kind == "enact"
    if is_hugging_face(attention):
        layers = projections(attention)
        embed_dim = layers["W_q"].in_features
        dropout = attention.attention_dropout if hasattr(attention, "attention_dropout") else attention.dropout
        layer = HuggingFaceSelfAttention if enact else HUGGING_FACE_RIVALS[kind]
        new = layer(embed_dim, embed_dim // attention.head_dim, dropout, batch_first=True, **settings)
        sources = {name: (layer.weight, layer.bias) for name, layer in layers.items()}
        (*inner, out) = sources.values()
        in_weight, in_bias = (None if None in parts else torch.cat(parts) for parts in zip(*inner, strict=True))
    else:
        heads, dropout, batch_first = attention.num_heads, attention.dropout, attention.batch_first
        layer = EnactSelfAttention if enact else RIVALS[kind]
        new = layer(attention.embed_dim, heads, dropout, batch_first=batch_first, **settings)
        joint = in_weight, in_bias = attention.in_proj_weight, attention.in_proj_bias
        out = attention.out_proj.weight, attention.out_proj.bias
        sources = {"W_q": joint, "W_k": joint, "W_v": joint, "W_o": out}

    packed = dict(zip(PACKED, (in_weight, in_bias, *out), strict=True))
    packed = {name: tensor for name, tensor in packed.items() if tensor is not None}
    # Learned scores, which have no counterpart, and buffers.
    new.to(in_weight.device, torch.promote_types(in_weight.dtype, torch.float32))
    for name, tensor in clustered_weights(packed, new.num_heads, new.scale_logits if enact else True).items():
        layer, kind = name.split(".")
        source = sources[layer][kind == "bias"]
        # A missing bias becomes zeros that stay frozen.
        trained = source is not None and source.requires_grad
        setattr(new.get_submodule(layer), kind, nn.Parameter(tensor, requires_grad=trained))
    return new.train(attention.training)
