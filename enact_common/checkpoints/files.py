"""Checkpoints: plain tensors and built-in types, written whole or not at all."""

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

from enact_common.cli.flags import CLUSTERING_FLAGS, ENACT_FLAGS, MODEL_FLAGS, NEGATABLE_FLAGS
from enact_common.utils.download import download, is_url
from enact_common.utils.errors import UserError
from enact_common.utils.files import read_tensors, write_file

logger = logging.getLogger("enact")

# Names in a run's folder: what each epoch replaces, and its copy at the evaluation with the highest AP so far.
LATEST, BEST = "checkpoint.pth", "best.pth"

# What DETR's first versions called their position embeddings.
OLD_NAMES = {"v2": "sine", "v3": "learned"}

# Of a model with a mask head, what the names of the detector's tensors and of the head's begin with.
DETECTOR, MASK_HEAD = "detr.", "mask_head."

EXPECTED = "a file that torch.save or safetensors wrote, with a state dict, by itself or under the key 'model'"

# Keys under which checkpoints keep a state dict, in the order in which they are looked for.
WEIGHTS = ("model", "state_dict", "model_state_dict", "ema", "model_ema", "module")

# Dicts in one another that are searched for a state dict.
MOST_NESTED = 4

# Parts of tensors' names that wrappers add, anywhere in the name: DataParallel and DistributedDataParallel,
# torch.compile, FSDP and activation checkpointing.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

# Prefixes before a detector's names, with a mask head and without: a Lightning module's attribute, say.
PREFIXES = re.compile(r"((?:\w+\.)*?)mask_head\."), re.compile(r"((?:\w+\.)*?)transformer\.(?:en|de)coder")


def detector_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a state dict the detector's part, under its own names: all of it, unless the model has a mask head."""
    if not has_masks(weights):
        return weights
    return {name.removeprefix(DETECTOR): tensor for name, tensor in weights.items() if name.startswith(DETECTOR)}


def has_masks(weights: Mapping[str, Any]) -> bool:
    """Whether a state dict is of a detector with a mask head."""
    return any(str(name).startswith(MASK_HEAD) for name in weights)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state`, whole or not at all.

    Raises:
        UserError: it cannot be written, because the disk is full, say; the old file is still there.
    """
    try:
        write_file(path, lambda file: torch.save(state, file))
    except UserError as error:
        kept = "; what it held before is still there" if path.is_file() else ""
        raise UserError(f"{error}{kept}. Make room or choose another --output_dir, and go on with --resume") from error


def load_checkpoint(source: str, to_resume: bool = False) -> dict[str, Any]:
    """Read a checkpoint of ours, of the original repositories, or of another training program's shape.

    The weights are looked for under `WEIGHTS`, and the names that wrappers added are taken off; one line in the log
    says what was done. Tensors come to the CPU.

    Args:
        source: a path, or an https URL that says the file's hash (`enact_common.utils.download.download`).
        to_resume: refuse another shape than ours: its optimizer's state would not belong to the renamed weights.

    Returns:
        a dict with at least `model`, from names to tensors; `args`, where there are any, as a dict.

    Raises:
        UserError: naming the file and what was expected; nothing in the file has been executed.
    """
    path = download(source) if is_url(source) else Path(source)
    state = read_tensors(path, EXPECTED)
    weights, place = find_weights(state)
    if weights is None:
        keys = f"keys {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path}: not a checkpoint ({keys}); expected {EXPECTED}")
    weights, changes = own_names(weights, source)
    if place != "model":
        changes.insert(0, f"weights taken from '{place}'" if place else "the whole file taken as weights")
    if changes and to_resume:
        raise UserError(
            f"{source}: no training can go on from a checkpoint of this shape ({'; '.join(changes)}). Pass it as "
            "--pretrained, to begin from its weights, or with --eval, to evaluate them"
        )
    state = {**state, "model": weights} if place else {"model": weights}
    if place.startswith("model_ema"):
        del state["model_ema"]
    elif find_weights(state.get("model_ema"))[0]:
        state["model_ema"], _ = own_names(find_weights(state["model_ema"])[0], source)
    # Our own averaged weights are for those who read the checkpoint to choose.
    first = place.partition(".")[0]
    aside = [key for key in WEIGHTS if key not in (first, "model", "model_ema") and find_weights(state.get(key))[0]]
    if aside:
        changes.append(f"weights taken from '{place}', not from {' or '.join(map(repr, aside))}")
    if changes:
        logger.warning("%s: %s", source, "; ".join(changes))
    args = state.get("args") or {}
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    args = dict(args) if isinstance(args, Mapping) else {}
    if "position_embedding" in args:
        args["position_embedding"] = OLD_NAMES.get(args["position_embedding"], args["position_embedding"])
    # Anchor DETR's parser kept the word that was typed, and built a dilated backbone for any.
    if "dilation" in args:
        args["dilation"] = bool(args["dilation"])
    # Nothing else was there to choose before the flag came.
    if args:
        args.setdefault("enact_scale_logits", False)
    return {**state, "args": args}


def find_weights(state: Any, nested: int = MOST_NESTED) -> tuple[dict[str, torch.Tensor] | None, str]:
    """The state dict in what a file holds, and the keys that lead to it, joined by dots.

    Args:
        state: tensors and built-in types.
        nested: how many dicts in one another are searched.

    Returns:
        the state dict, None where there is none; the keys are "" where it is all that the file holds.
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
    """A state dict under the detector's own names, without what wrappers and training programs added.

    Args:
        weights: from names to tensors, and to other things that are left out.
        source: the checkpoint's name, for the message.

    Returns:
        the state dict, and what was done, in words.

    Raises:
        UserError: two tensors would have one name.
    """
    changes = []
    found = {part for name in weights for part in name.split(".")[:-1] if part in WRAPPERS}
    if found:
        changes.append(f"{', '.join(f'{part}.' for part in sorted(found))} taken off the tensors' names")
    names = {name: ".".join(p for p in name.split(".") if p not in found) for name in weights}
    prefixes: list[str] = []
    for pattern in PREFIXES:
        prefixes = prefixes or list(dict.fromkeys(m[1] for m in map(pattern.match, names.values()) if m))
    prefix = next((p for p in ("", "model.") if p in prefixes), prefixes[0] if prefixes else "")
    others = tuple(p for p in prefixes if p.startswith(prefix) and p != prefix)
    if prefix:
        changes.append(f"{prefix} taken off the tensors' names")
    own: dict[str, torch.Tensor] = {}
    left_out = []
    for name, bare in names.items():
        short = bare.removeprefix(prefix)
        if not bare.startswith(prefix) or bare.startswith(others) or not torch.is_tensor(weights[name]):
            left_out.append(name)
        elif short in own:
            raise UserError(f"{source}: has two tensors {short}, one of them as {name}: save one model alone")
        elif short != "n_averaged":  # AveragedModel's counter
            own[short] = weights[name]
    if left_out:
        changes.append(f"left out: {', '.join(left_out[:3])}{', ...' if len(left_out) > 3 else ''}")
    return own, changes


def saved_clustering_flags(saved: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The values in a checkpoint's arguments of ENACT's settings that this run's arguments leave open."""
    return {flag: saved.get(flag) for flag in CLUSTERING_FLAGS if getattr(args, flag, None) is None}


def check_model_flags(source: str, saved: dict[str, Any], args: argparse.Namespace) -> None:
    """Refuse a checkpoint whose model was built with other flags than this run's.

    Args:
        source: the checkpoint's name, for the message.
        saved: its arguments. Flags that they do not know are passed over.
        args: this run's arguments.

    Raises:
        UserError: naming the flags to pass.
    """
    differing = differing_flags(saved, args)
    if differing:
        asked = ", ".join(flag_text(flag, saved[flag]) for flag in differing)
        raise UserError(
            f"{source}: was made with other flags than this run's. Pass, as then: {asked}; or begin a training with "
            "what fits of it: --pretrained in place of --resume"
        )


def differing_flags(saved: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """The model's flags that a checkpoint was made with other values of.

    Args:
        saved: the checkpoint's arguments. Flags that they do not know are passed over.
        args: this run's arguments.
    """
    flags = [flag for flag in MODEL_FLAGS if flag not in ENACT_FLAGS or args.encoder_attention == "enact"]
    return [
        flag
        for flag in flags
        if None not in (saved.get(flag), getattr(args, flag, None)) and saved[flag] != getattr(args, flag)
    ]


def flag_text(flag: str, value: Any) -> str:
    """A flag as it is typed to have this value."""
    if isinstance(value, bool):
        off = f"--no-{flag}" if flag in NEGATABLE_FLAGS else f"no --{flag}"
        return f"--{flag}" if value else off
    return f"--{flag} {value}"


def load_model(model: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load a state dict whose names and shapes must all fit.

    Raises:
        UserError: naming the file and the first tensors that do not fit.
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

    Optimizers number their parameters in the order in which modules were made, and the reference made them in
    another order than we do. The checkpoint's own state dict knows its order, so the numbers can be given names.
    Groups without parameters, such as Anchor DETR's third, are passed over: ours has none. How a step is computed
    (fused or not) stays this optimizer's own, and moments come to lie in memory as their parameters do: a fused step
    goes over both as they lie.

    Args:
        checkpoint: with `model` and `optimizer`.
        model: ours, of the same names.
        optimizer: over the model's parameters.

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
        # SGD's groups know a momentum, AdamW's do not.
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
                state[i] = {key: laid_out_as(parameter, value) for key, value in moments.items()} if fits else {}
        position += len(ours)
    if not fits:
        raise UserError(
            "the checkpoint's optimizer state does not fit this run's parameters: take the flags that it was trained "
            "with, or remove its 'optimizer' to start from the weights alone"
        )
    return {"state": state, "param_groups": groups}


def laid_out_as(parameter: torch.Tensor, value: Any) -> Any:
    """A tensor of a parameter's shape in its memory format, on the CPU; anything else as it is."""
    if not torch.is_tensor(value) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)


def random_states() -> dict[str, Any]:
    """The states of all random generators that a run uses, as tensors and built-in types."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` gave. GPUs' states are put back where their number is the same."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
