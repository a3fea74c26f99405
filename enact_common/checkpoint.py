"""Checkpoints: plain tensors and built-in types, written whole or not at all."""

import argparse
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from enact_common.arguments import MODEL_FLAGS
from enact_common.errors import UserError

# The original repositories keep their arguments in one; nothing else beyond tensors and built-in types is let in.
torch.serialization.add_safe_globals([argparse.Namespace])

EXPECTED = "a file that torch.save wrote, holding a dict with the key 'model' (a state dict)"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` beside `path` and rename it into place, so that a file of this name is always complete."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(source: str) -> dict[str, Any]:
    """Read a checkpoint of ours or of the original repositories; tensors come to the CPU.

    Args:
        source: a path, or an https URL, which goes through PyTorch's own download cache.

    Returns:
        a dict with at least `model`; `args`, where there are any, as a dict.

    Raises:
        UserError: naming the file and what was expected.
    """
    if source.startswith("https:"):
        try:
            state = torch.hub.load_state_dict_from_url(source, map_location="cpu", check_hash=True, weights_only=True)
        except OSError as error:
            raise UserError(
                f"--resume {source}: cannot be downloaded ({error}); download it elsewhere and pass its path"
            ) from error
    else:
        state = read_checkpoint_file(Path(source))
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        keys = f"keys {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{source}: not a checkpoint ({keys}); expected {EXPECTED}")
    if isinstance(state.get("args"), argparse.Namespace):
        state["args"] = vars(state["args"])
    return state


def read_checkpoint_file(path: Path) -> Any:
    """What `torch.load` finds in a file, tensors and built-in types alone.

    Raises:
        UserError: the file is missing, truncated, or holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: truncated, or no checkpoint ({first[:200]}); expected {EXPECTED}") from error


def plain_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as built-in types, for a checkpoint."""
    return dict(vars(args))


def check_model_flags(source: str, saved: dict[str, Any], args: argparse.Namespace) -> None:
    """Refuse a checkpoint whose model was built with other flags than this run's.

    Args:
        source: the checkpoint's name, for the message.
        saved: its arguments. Flags that they do not know are passed over.
        args: this run's arguments.

    Raises:
        UserError: naming the flags to pass.
    """
    differing = [
        (flag, saved[flag], getattr(args, flag))
        for flag in MODEL_FLAGS
        if flag in saved and None not in (saved[flag], getattr(args, flag)) and saved[flag] != getattr(args, flag)
    ]
    if differing:
        listed = "; ".join(f"--{flag} was {then}, is {now}" for flag, then, now in differing)
        raise UserError(f"{source}: was made with other flags than this run's: {listed}. Pass those it was made with.")


def load_model(model: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load a state dict whose names and shapes must all fit.

    Raises:
        UserError: naming the file and the first tensors that do not fit.
    """
    own = model.state_dict()
    faults = [f"{name} is missing" for name in own if name not in state]
    faults += [f"{name} is not in the model" for name in state if name not in own]
    faults += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if faults:
        raise UserError(
            f"{source}: does not fit this model, {len(faults)} tensors differ: {'; '.join(faults[:3])}. Check the "
            "variant, --encoder_attention, --backbone, --num_classes, --num_queries and the layer counts."
        )
    model.load_state_dict(state)


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
