"""Replace the attention in a third-party detector by ENACT's or a rival's, keeping its weights.

`foreign.py` knows the attention classes that can be replaced. This file selects them in a model, replaces them, and
notes in a Hugging Face model's configuration what it did, so that `load_plugged` can do it again.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .conversion import clustered_weights
from .foreign import (
    SUPPORTED,
    VisionTransformerSelfAttention,
    class_for,
    fault_of_foreign,
    is_foreign,
    is_vision_transformers,
    keep_output,
    known_tokens,
    read_attention,
)
from .kernels import AUTO
from .layer import EnactSelfAttention
from .map_tokens import MapTokens
from .rivals import RIVALS, RivalSelfAttention

Where = str | re.Pattern | Callable[[str, nn.Module], bool]

# Base classes of the attention that `plug_in` puts in.
REPLACEMENTS = (EnactSelfAttention, RivalSelfAttention)


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
    tokens: MapTokens | None = None,
    kernels: str = AUTO,
    zero_scores: bool = False,
) -> list[str]:
    """Replace the encoder self-attention of any model by ENACT's or a rival's, in place, keeping its weights.

    With ENACT, the result is exact while each cluster is one token; longer clusters approximate. `W_prob`, which scores
    the tokens, starts untrained, so fine-tune the model. `W_prob`, and what else a rival learns, is float32 even in a
    model of lower precision. Everything else is kept: weights, heads, dropout, device and dtype, `requires_grad`,
    training or evaluation mode. Make the optimizer afterwards: an existing one would still hold the old weights.

    The tokens must be the cells of a feature map in row-major order, in batches, or `tokens` must name those that are.

    What was replaced, and the settings, go into the configuration of a Hugging Face model, as `config.enact`: files of
    `save_pretrained` have them, and `load_plugged` builds the same model. Pass the whole model for that.

    Args:
        module: the model, or an encoder that holds the attention. In a PyTorch `TransformerEncoder` below it, nested
            tensors are switched off.
        sigma: standard deviation of the information's smoothing, tokens.
        where: which attention modules to replace: a regular expression that must match the whole dotted name, or a
            function (name, module) -> bool. None: the encoder self-attention (see `in_encoder`) of supported classes.
        kind: "enact", or a name in `RIVALS`.
        clusters, per_image, mask_padding, max_clusters, temperature, kernels, zero_scores: as in `EntropyClustering`.
        scale_logits: as in `EnactSelfAttention`. It does not change the model's output, but how it trains.
        token_budget, map_size: as in `RivalSelfAttention`. A kind that needs the map's size needs it here, unless the
            model passes `map_size` in its calls.
        tokens: which tokens are the map's, for ENACT in all the attention that is replaced. None: all are, but not in
            the vision transformers that `known_tokens` knows: those of YOLOS, timm and torchvision.

    Returns:
        the names of the replaced modules, in the model's order.

    Raises:
        ValueError: nothing matches, an attention cannot be replaced, the module is no module, or the kind or a setting
            is invalid, such as a setting of another kind. The model is then unchanged.
    """
    if not isinstance(module, nn.Module):
        got = f"the class {module.__name__}" if isinstance(module, type) else repr(module)
        raise ValueError(f"plug_in takes a model, an nn.Module with its weights, got {got}: build or load the model")
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
            "tokens": tokens,
            "kernels": kernels,
            "zero_scores": zero_scores,
        },
    )
    candidates = attention_modules(module)
    targets = select(module, candidates, where)
    if not targets:
        raise ValueError(no_match_message(module, candidates, where))
    maps = {name: tokens or tokens_at(module, name) for name in targets}
    reasons = {
        name: reason_against(attention, candidates, targets) or reason_against_tokens(attention, kind, maps[name])
        for name, attention in targets.items()
    }
    refused = [f"{name} ({type(targets[name]).__name__}): {reason}" for name, reason in reasons.items() if reason]
    if refused:
        raise ValueError(
            "\n  ".join([f"{'ENACT' if kind == 'enact' else kind} cannot replace:", *refused])
            + "\nNothing was replaced. Exclude these, or choose others, with where."
        )

    # Make all before replacing any, so that an error leaves the model unchanged. Shared attention stays shared.
    of_layer = {name: settings | ({"tokens": maps[name]} if kind == "enact" else {}) for name in targets}
    names = {id(attention): name for name, attention in targets.items()}
    replacements = {key: replacement(targets[name], kind, of_layer[name]) for key, name in names.items()}
    for name, attention in targets.items():
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, replacements[id(attention)])
    for encoder in module.modules():
        # At construction it chose, for the old attention, to pass padded batches as nested tensors.
        if isinstance(encoder, nn.TransformerEncoder) and any(isinstance(m, REPLACEMENTS) for m in encoder.modules()):
            encoder.use_nested_tensor = False
    note_settings(module, kind, of_layer)
    return list(targets)


def note_settings(module: nn.Module, kind: str, of_layer: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the replaced modules' kind and settings into a Hugging Face model's configuration, as `config.enact`.

    Args:
        module: the model; one without such a configuration is left alone.
        kind: see `plug_in`.
        of_layer: the settings of each replaced module, by its name in the model.
    """
    config = getattr(module, "config", None)
    if not hasattr(config, "to_json_string"):
        return
    noted = {name: {"kind": kind, **settings} for name, settings in of_layer.items()}
    for settings in noted.values():
        if settings.get("tokens") is not None:
            settings["tokens"] = asdict(settings["tokens"])
    config.enact = {**(getattr(config, "enact", None) or {}), **noted}


def plug_in_noted(module: nn.Module, noted: Mapping[str, Mapping[str, Any]]) -> None:
    """Call `plug_in` as `note_settings` noted it.

    Args:
        module: the plain model.
        noted: `config.enact`, as read from JSON.

    Raises:
        ValueError: the settings are not those of this version, or the model has no such module.
    """
    for name, settings in noted.items():
        settings = dict(settings)
        if settings.get("tokens") is not None:
            settings["tokens"] = MapTokens(**settings["tokens"])
        if settings.get("map_size") is not None:
            settings["map_size"] = tuple(settings["map_size"])
        plug_in(module, where=re.escape(name), **settings)


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
            if (isinstance(attention, nn.MultiheadAttention) or is_foreign(attention)) and in_encoder(module, name)
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

    At least one module on the path to it must be an encoder, an encoder layer or a vision transformer that
    `known_tokens` knows, and none a decoder or decoder layer. The attribute's name and its class's (base classes
    included) count; a module whose names contain both words is ignored. The attention itself must not have "cross" in
    its name.
    """
    encoder, last = False, name.rpartition(".")[2]
    for attribute, around in around_attention(module, name):
        words = " ".join((attribute, *(base.__name__ for base in type(around).__mro__))).lower()
        if "decoder" in words and "encoder" not in words:
            return False
        encoder |= ("encoder" in words and "decoder" not in words) or known_tokens(around) is not None
    return encoder and "cross" not in last.lower()


def around_attention(module: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """Return the modules around the attention of that name, with their attributes' names: the model first, as ""."""
    path = [("", module)]
    for attribute in name.split(".")[:-1]:
        path.append((attribute, getattr(path[-1][1], attribute)))
    return path


def tokens_at(module: nn.Module, name: str) -> MapTokens | None:
    """Return `known_tokens` of the innermost module around the attention of that name that has them."""
    known = [known_tokens(around) for _, around in around_attention(module, name)]
    return next((tokens for tokens in reversed(known) if tokens is not None), None)


def no_match_message(module: nn.Module, candidates: Mapping[str, nn.Module], where: Where | None) -> str:
    """Return the error message when nothing matches: which attention there is, and how to select it."""
    owner = type(module).__name__
    if isinstance(module, nn.MultiheadAttention) or is_foreign(module):
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
    if is_foreign(attention):
        return fault_of_foreign(attention)
    if type(attention) is not nn.MultiheadAttention:
        if isinstance(attention, nn.MultiheadAttention):
            return "a subclass of nn.MultiheadAttention may compute something else"
        return f"it is neither {SUPPORTED}"
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


def reason_against_tokens(attention: nn.Module, kind: str, tokens: MapTokens | None) -> str | None:
    """Return why an attention's tokens do not allow a kind of attention; None if they do.

    Args:
        attention, kind: as in `plug_in`.
        tokens: which tokens are the map's, as far as that is known.
    """
    if is_vision_transformers(attention) and tokens is None:
        return "class or detection tokens may stand beside its map: pass tokens=MapTokens(before=..., after=...)"
    if kind != "enact" and tokens is not None:
        return "it attends to tokens beside its map, for which rivals have no keys: use kind='enact'"
    return None


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
        has = {
            "token_budget": rival.takes_budget,
            "map_size": rival.needs_map_size,
            "zero_scores": rival.learns_scores,
        }
        own = {name for name in has if has[name]}
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
    plain = read_attention(attention)
    new = class_for(attention, kind)(
        plain.embed_dim, plain.num_heads, plain.dropout, batch_first=plain.batch_first, **settings
    )
    if isinstance(new, VisionTransformerSelfAttention):
        keep_output(attention, new)
    in_weight = plain.packed["in_proj_weight"]
    # Learned scores, which have no counterpart, and buffers.
    new.to(in_weight.device, torch.promote_types(in_weight.dtype, torch.float32))
    scaled = new.scale_logits if kind == "enact" else True
    for name, tensor in clustered_weights(plain.packed, new.num_heads, scaled).items():
        layer, part = name.split(".")
        source = plain.sources[layer][part == "bias"]
        # A missing bias becomes zeros that stay frozen.
        trained = source is not None and source.requires_grad
        setattr(new.get_submodule(layer), part, nn.Parameter(tensor, requires_grad=trained))
    return new.train(attention.training)
