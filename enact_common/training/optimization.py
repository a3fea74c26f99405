"""Parameter groups, learning-rate schedules, and the optimizer with its settings."""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from enact_common.training.averaging import WeightAverage
from enact_common.utils.errors import UserError


@dataclass
class Optimization:
    """The optimizer and everything else that an optimizer step needs.

    Attributes:
        optimizer: of all trained parameters; fused, so that the device can skip a step without the host.
        learning_rate: called with (epoch, optimizer step in the epoch, steps per epoch); sets the learning rates.
        amp: a key of `AMP_DTYPE`.
        scaler: scales the loss under fp16; disabled otherwise.
        clip_max_norm: upper limit of the norm over all gradients; 0 does not clip.
        accumulate: batches whose gradients are averaged in one step.
        average: the EMA weights; None without EMA.
    """

    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int, int, int], None]
    amp: str
    scaler: torch.amp.GradScaler
    clip_max_norm: float
    accumulate: int
    average: WeightAverage | None = None


def build_optimization(
    model: nn.Module, args: argparse.Namespace, device: torch.device, average: WeightAverage | None = None
) -> Optimization:
    """Return the optimizer, learning-rate schedule and gradient scaler that the arguments ask for.

    The model is on its device; `average` are the EMA weights to update in each step.

    Raises:
        UserError: a name in `--lr_backbone_names` or `--lr_linear_proj_names` matches no parameter.
    """
    for flag in ("lr_backbone_names", "lr_linear_proj_names"):
        check_parameter_names(model, f"--{flag}", getattr(args, flag))
    groups = parameter_groups(
        model, args.lr, args.lr_backbone, args.lr_backbone_names, args.lr_linear_proj_names, args.lr_linear_proj_mult
    )
    # Fused runs one kernel per group instead of a dozen per tensor, which saves much of a small model's step time.
    settings = {"lr": args.lr, "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.SGD(groups, momentum=0.9, **settings) if args.sgd else torch.optim.AdamW(groups, **settings)
    if args.sgd:
        # Start the momentum at zero: if the first step is skipped, PyTorch leaves it as uninitialised memory.
        for parameter in (p for group in groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def set_lr(epoch: int, step: int, steps: int) -> None:
        factor = learning_rate_factor(
            args.lr_schedule, epoch * steps + step, epoch, args.epochs * steps, args.lr_drop, args.warmup_steps,
            args.lr_drop_epochs,
        )  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    return Optimization(optimizer, set_lr, args.amp, scaler, args.clip_max_norm, args.accumulate, average)


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Freeze the parameters whose name contains one of the parts (`--freeze`).

    Raises:
        UserError: a part matches no parameter, or no parameter is left to train.
    """
    check_parameter_names(model, "--freeze", parts)
    for name, parameter in model.named_parameters():
        if any(part in name for part in parts):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"--freeze {' '.join(parts)}: no parameter is left to train; name fewer parts")


def parameter_groups(
    model: nn.Module,
    lr: float,
    lr_backbone: float,
    backbone_names: Sequence[str] = ("backbone",),
    linear_proj_names: Sequence[str] = (),
    linear_proj_mult: float = 0.1,
) -> list[dict]:
    """Return the trained parameters in groups: the backbone and linear projections have separate learning rates.

    Args:
        backbone_names: a parameter whose name contains one of these belongs to the backbone.
        linear_proj_names: any other parameter whose name contains one of these is a linear projection.
        linear_proj_mult: learning rate of linear projections as a fraction of `lr`.

    Returns:
        the groups that are not empty, each with a `name` ("" for all other parameters), in the reference's order.
    """
    rates = {"": lr, "backbone": lr_backbone, "linear projections": lr * linear_proj_mult}
    members: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_backbone = any(part in name for part in backbone_names)
            in_projections = any(part in name for part in linear_proj_names)
            group = "backbone" if in_backbone else "linear projections" if in_projections else ""
            members[group].append(parameter)
    return [
        {"params": members[name], "lr": rate, "initial_lr": rate, "name": name}
        for name, rate in rates.items()
        if members[name]
    ]


def check_parameter_names(model: nn.Module, flag: str, parts: Sequence[str]) -> None:
    """Refuse a part that occurs in no parameter's name; frozen parameters count too.

    Raises:
        UserError: names the flag, the part and example parameters.
    """
    names = [name for name, _ in model.named_parameters()]
    for part in parts:
        if not any(part in name for name in names):
            # Evenly spaced, so that the examples cover the whole model.
            examples = ", ".join(names[:: max(len(names) // 6, 1)])
            raise UserError(f"{flag} {part}: no parameter's name contains it; use part of a name such as {examples}")


def drops_until(epoch: int, lr_drop: int, drop_epochs: Sequence[int] | None) -> int:
    """Return how often the step schedule has dropped the learning rate after `epoch` epochs.

    It drops after each of `drop_epochs`; without them, after every `lr_drop` epochs.
    """
    return epoch // lr_drop if drop_epochs is None else sum(epoch >= drop for drop in set(drop_epochs))


def learning_rate_factor(
    schedule: str,
    step: int,
    epoch: int,
    total_steps: int,
    lr_drop: int,
    warmup_steps: int,
    drop_epochs: Sequence[int] | None = None,
) -> float:
    """Return the factor of the base learning rates, in [0, 1], after `step` optimizer steps and `epoch` epochs.

    The schedule is "step", divided by 10 at each drop (`drops_until`); or "cosine", from 1 to 0 over `total_steps`. In
    the first `warmup_steps`, the factor rises linearly from near 0.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "step":
        return 0.1 ** drops_until(epoch, lr_drop, drop_epochs)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(total_steps - warmup_steps, 1)))
