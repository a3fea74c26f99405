"""Read and write checkpoints: plain tensors and built-in types, written atomically."""

import argparse
import logging
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from enact_common.checkpoints.bundled import bundled_file
from enact_common.checkpoints.huggingface import (
    CONFIG,
    MODEL_TYPES,
    WEIGHT_FILES,
    facts_of_config,
    from_hugging_face,
    is_hugging_face,
    weights_file,
)
from enact_common.cli.flags import CLUSTERING_FLAGS, ENACT_FLAGS, MODEL_FLAGS, NEGATABLE_FLAGS
from enact_common.utils.download import download, is_url
from enact_common.utils.errors import UserError
from enact_common.utils.files import read_json, read_tensors, write_file

logger = logging.getLogger("enact")

# File names in a run's folder: the latest epoch, and the copy with the highest AP so far.
LATEST, BEST = "checkpoint.pth", "best.pth"

# Position embedding names in DETR's first versions.
OLD_NAMES = {"v2": "sine", "v3": "learned"}

# The value of `library_name` in the `config.json` of a folder that `EnactDetector.save_pretrained` wrote.
LIBRARY = "enact-detection"

# State-dict prefixes in `DETRsegm`.
DETECTOR, MASK_HEAD = "detr.", "mask_head."

EXPECTED = "a file from torch.save or safetensors with a state dict, at the top level or under the key 'model'"

# Keys under which checkpoints keep a state dict, in search order.
WEIGHTS = ("model", "state_dict", "model_state_dict", "ema", "model_ema", "module")

# Depth to which nested dicts are searched for a state dict.
MOST_NESTED = 4

# Parts that wrappers add anywhere in a tensor's name: DataParallel and DistributedDataParallel, torch.compile, FSDP and
# activation checkpointing.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

# Prefixes before a detector's tensor names, such as a Lightning module's attribute: with a mask head, and without.
PREFIXES = re.compile(r"((?:\w+\.)*?)mask_head\."), re.compile(r"((?:\w+\.)*?)transformer\.(?:en|de)coder")


def detector_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The detector's part of a state dict, without the prefix that a model with a mask head adds."""
    if not has_masks(weights):
        return weights
    return {name.removeprefix(DETECTOR): tensor for name, tensor in weights.items() if name.startswith(DETECTOR)}


def has_masks(weights: Mapping[str, Any]) -> bool:
    """Whether a state dict is of a detector with a mask head."""
    return any(str(name).startswith(MASK_HEAD) for name in weights)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` atomically.

    Raises:
        UserError: the file cannot be written, for example because the disk is full. An older file is kept.
    """
    try:
        write_file(path, lambda file: torch.save(state, file))
    except UserError as error:
        kept = "; its previous content is kept" if path.is_file() else ""
        raise UserError(f"{error}{kept}. Free space or choose another --output_dir, then use --resume") from error


def load_checkpoint(source: str, to_resume: bool = False) -> dict[str, Any]:
    """Read a checkpoint of this project, the original repositories, Hugging Face or another training program.

    The weights are searched under `WEIGHTS`, prefixes of wrappers are removed, and Hugging Face's DETR and Conditional
    DETR are converted. One line in the log lists the changes. Tensors are loaded to the CPU.

    Args:
        source: a path; an https URL with the file's hash (`enact_common.utils.download.download`); or one of
            `BUNDLED`. A folder has a `config.json` and the weights: one of Hugging Face's, or of
            `EnactDetector.save_pretrained`.
        to_resume: refuse checkpoints in a foreign format: the optimizer state would not match the renamed weights.

    Returns:
        a dict with at least `model`, from names to tensors, and `args`, a dict that may be empty.

    Raises:
        UserError: the file is not a checkpoint. No code in the file is executed.
    """
    path = download(source) if is_url(source) else bundled_file(source) or Path(source)
    path, config = with_config(path)
    state = read_tensors(path, EXPECTED)
    if config and config.get("library_name") == LIBRARY:
        state, config = {**config, "model": state}, None
    weights, place = find_weights(state)
    if weights is None:
        keys = f"keys {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path}: not a checkpoint ({keys}); expected {EXPECTED}")
    weights, changes = own_names(weights, source)
    if is_hugging_face(weights):
        weights = from_hugging_face(weights, source)
        changes.append("converted from Hugging Face's names")
    elif not place:
        changes.insert(0, "the whole file taken as weights")
    if place not in ("", "model"):
        changes.insert(0, f"weights taken from '{place}'")
    if changes and to_resume:
        raise UserError(
            f"{source}: cannot resume from a checkpoint in this format ({'; '.join(changes)}). Use --pretrained to "
            "start from its weights, or --eval to evaluate them"
        )
    state = {**state, "model": weights} if place else {"model": weights}
    if config:
        state |= facts_of_config(config, path.parent, weights)
    if place.startswith("model_ema"):
        del state["model_ema"]
    elif find_weights(state.get("model_ema"))[0]:
        state["model_ema"], _ = own_names(find_weights(state["model_ema"])[0], source)
    # `model_ema` is not ignored: `averaged_weights` chooses it.
    top = place.partition(".")[0]
    ignored = [key for key in WEIGHTS if key not in (top, "model", "model_ema") and find_weights(state.get(key))[0]]
    if ignored:
        changes.append(f"weights taken from '{place}', not from {' or '.join(map(repr, ignored))}")
    if changes:
        logger.warning("%s: %s", source, "; ".join(changes))
    args = state.get("args") or {}
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    args = dict(args) if isinstance(args, Mapping) else {}
    if "position_embedding" in args:
        args["position_embedding"] = OLD_NAMES.get(args["position_embedding"], args["position_embedding"])
    # Anchor DETR's parser stored the flag's text, and any text meant a dilated backbone.
    if "dilation" in args:
        args["dilation"] = bool(args["dilation"])
    # Checkpoints older than the flag were trained without it.
    if args:
        args.setdefault("enact_scale_logits", False)
    return {**state, "args": args}


def with_config(path: Path) -> tuple[Path, dict[str, Any] | None]:
    """Return the path of the weights, and the `config.json` beside them.

    The path is a checkpoint; or a folder with a `config.json`, or the file of weights in it. The configuration is None
    if there is none, or it is of a model without counterpart here; a folder of another model is refused.
    """
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / CONFIG) if path.is_dir() or path.name in WEIGHT_FILES else None
    known = config is not None and (config.get("library_name") == LIBRARY or config.get("model_type") in MODEL_TYPES)
    if not path.is_dir():
        return path, config if known else None
    if known:
        return weights_file(folder), config
    if config and "model_type" in config:
        raise UserError(
            f"{path}: a Hugging Face model of the type {config['model_type']!r}; pass one of the types "
            f"{' and '.join(map(repr, MODEL_TYPES))}"
        )
    return path, None


def find_weights(state: Any, nested: int = MOST_NESTED) -> tuple[dict[str, torch.Tensor] | None, str]:
    """Find the state dict in a file's content, at most `nested` dicts deep.

    Returns the state dict, or None; and its keys joined by dots, "" for the top level.
    """
    if not isinstance(state, dict) or not nested:
        return None, ""
    for key in WEIGHTS:
        weights, place = find_weights(state.get(key), nested - 1)
        if weights is not None:
            return weights, f"{key}.{place}".rstrip(".")
    named = all(isinstance(name, str) for name in state)
    return (state if named and any(map(torch.is_tensor, state.values())) else None), ""


def own_names(weights: dict[str, Any], source: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Rename a state dict to the detector's names, without the prefixes of wrappers and training programs.

    Values that are not tensors are left out. Returns the state dict, and the changes in words.

    Raises:
        UserError: two tensors of `source` would get the same name.
    """
    changes = []
    wrappers = {part for name in weights for part in name.split(".")[:-1] if part in WRAPPERS}
    if wrappers:
        changes.append(f"{', '.join(f'{part}.' for part in sorted(wrappers))} removed from the tensors' names")
    names = {name: ".".join(p for p in name.split(".") if p not in wrappers) for name in weights}
    prefixes: list[str] = []
    for pattern in PREFIXES:
        prefixes = prefixes or list(dict.fromkeys(m[1] for m in map(pattern.match, names.values()) if m))
    prefix = next((p for p in ("", "model.") if p in prefixes), prefixes[0] if prefixes else "")
    other_prefixes = tuple(p for p in prefixes if p.startswith(prefix) and p != prefix)
    if prefix:
        changes.append(f"{prefix} removed from the tensors' names")
    own: dict[str, torch.Tensor] = {}
    left_out = []
    for name, bare in names.items():
        short = bare.removeprefix(prefix)
        if not bare.startswith(prefix) or bare.startswith(other_prefixes) or not torch.is_tensor(weights[name]):
            left_out.append(name)
        elif short in own:
            raise UserError(f"{source}: has two tensors {short}, one under the name {name}; save only one model")
        elif short != "n_averaged":  # AveragedModel's counter
            own[short] = weights[name]
    if left_out:
        changes.append(f"left out: {', '.join(left_out[:3])}{', ...' if len(left_out) > 3 else ''}")
    return own, changes


def saved_clustering_flags(saved: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """A checkpoint's values of `CLUSTERING_FLAGS` that this run does not set."""
    return {flag: saved.get(flag) for flag in CLUSTERING_FLAGS if getattr(args, flag, None) is None}


def check_model_flags(source: str, saved: dict[str, Any], args: argparse.Namespace) -> None:
    """Refuse a checkpoint whose model flags differ from this run's; missing flags are ignored.

    Raises:
        UserError: flags differ. The message lists the flags to pass.
    """
    differing = differing_flags(saved, args)
    if differing:
        asked = ", ".join(flag_text(flag, saved[flag]) for flag in differing)
        raise UserError(
            f"{source}: was trained with other flags. Pass the flags of that run: {asked}; or use --pretrained instead "
            "of --resume to fine-tune from the weights that fit"
        )


def differing_flags(saved: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """The model flags that differ between a checkpoint's arguments and this run's; missing flags are ignored."""
    flags = [flag for flag in MODEL_FLAGS if flag not in ENACT_FLAGS or args.encoder_attention == "enact"]
    return [
        flag
        for flag in flags
        if None not in (saved.get(flag), getattr(args, flag, None)) and saved[flag] != getattr(args, flag)
    ]


def flag_text(flag: str, value: Any) -> str:
    """The command-line text that sets a flag to a value."""
    if isinstance(value, bool):
        off = f"--no-{flag}" if flag in NEGATABLE_FLAGS else f"no --{flag}"
        return f"--{flag}" if value else off
    return f"--{flag} {value}"


class Undrawn(TorchFunctionMode):
    """A context that leaves new weights undrawn, for a model that `load_model` fills.

    Random numbers for a ResNet-50 take longer than reading it, and the caller's random state stays as it was.
    """

    DRAWING = frozenset(
        (
            torch.Tensor.normal_, torch.Tensor.uniform_, init.normal_, init.uniform_, init.trunc_normal_,
            init.kaiming_normal_, init.kaiming_uniform_, init.xavier_normal_, init.xavier_uniform_,
        )
    )  # fmt: skip

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.DRAWING:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def load_model(model: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load a state dict whose names and shapes must all match.

    Raises:
        UserError: tensors differ. The message lists the first ones.
    """
    own = model.state_dict()
    faults = [f"{name} is missing" for name in own if name not in state]
    faults += [f"{name} is not in the model" for name in state if name not in own]
    shapes = {name: tuple(getattr(value, "shape", ("no tensor",))) for name, value in state.items()}
    faults += [
        f"{name} is {shapes[name]}, expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and shapes[name] != tuple(tensor.shape)
    ]
    if faults:
        raise UserError(
            f"{source}: does not fit this model, {len(faults)} tensors differ: {'; '.join(faults[:3])}. Check the "
            "variant, --encoder_attention, --backbone, --num_classes, and the numbers of queries and layers."
        )
    model.load_state_dict(state)


def optimizer_state_by_name(
    checkpoint: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """A checkpoint's optimizer state in the order of this optimizer's parameters.

    Optimizers number parameters in module creation order, which differs between the reference and this project. The
    order of the checkpoint's state dict gives each number its name. Groups without parameters, such as Anchor DETR's
    third, are ignored, because this project has none. The implementation (fused or not) stays this optimizer's. Moments
    get their parameter's memory format, because a fused step reads both in storage order.

    Raises:
        UserError: the optimizer's kind, the groups or the numbers of parameters differ.
    """
    saved = checkpoint["optimizer"]
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    state, groups = {}, []
    saved_groups = saved.get("param_groups", ()) if isinstance(saved, dict) else ()
    saved_groups = [group for group in saved_groups if group["params"]]
    fits = len(saved_groups) == len(optimizer.param_groups)
    position = 0
    for group, saved_group in zip(optimizer.param_groups, saved_groups, strict=False):
        ours = [name_of[parameter] for parameter in group["params"]]
        theirs = [name for name in checkpoint["model"] if name in set(ours)]
        # SGD's groups have a momentum, AdamW's have none.
        fits = fits and ("momentum" in saved_group) == ("momentum" in group)
        fits = fits and len(theirs) == len(ours) == len(saved_group["params"])
        if not fits:
            break
        number = dict(zip(theirs, saved_group["params"], strict=True))
        implementation = {name: group[name] for name in ("fused", "foreach")}
        groups.append({**saved_group, **implementation, "params": list(range(position, position + len(ours)))})
        for i, (name, parameter) in enumerate(zip(ours, group["params"], strict=True), start=position):
            if number[name] in saved["state"]:
                moments = saved["state"][number[name]]
                fits = fits and all(t.shape == parameter.shape for t in moments.values() if getattr(t, "ndim", 0))
                state[i] = {key: to_format_of(parameter, value) for key, value in moments.items()} if fits else {}
        position += len(ours)
    if not fits:
        raise UserError(
            "the checkpoint's optimizer state does not fit this run's parameters: pass the flags that it was trained "
            "with, or remove the key 'optimizer' to start from only the weights"
        )
    return {"state": state, "param_groups": groups}


def to_format_of(parameter: torch.Tensor, value: Any) -> Any:
    """Return a tensor of the parameter's shape in its memory format; other values unchanged."""
    if not torch.is_tensor(value) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)


def random_states() -> dict[str, Any]:
    """The states of all random generators of a run, as tensors and built-in types."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Restore the states of `random_states`. GPU states are restored only if the number of GPUs matches."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
