"""What changes the weights: parameter groups, learning-rate schedules, and the optimizer with its settings."""

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
    """All that changes weights in a step.

    Attributes:
        optimizer: over all trained parameters; fused, so that it can skip a step on the device.
        learning_rate: called with (epoch, optimizer step in it, steps in it); sets the optimizer's rates.
        amp: a key of `AMP_DTYPE`.
        scaler: scales the loss under fp16; disabled otherwise.
        clip_max_norm: largest norm of all gradients together; 0 does not clip.
        accumulate: batches whose gradients make one step.
        average: of the weights over the steps; None for none.
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
    """The optimizer that the arguments ask for, and what goes with it.

    Args:
        model: on its device.
        args: parsed arguments.
        device: where the model is.
        average: of the model's weights, to be kept up; None for none.

    Raises:
        UserError: a name that asks for a learning rate fits no parameter.
    """
    for flag in ("lr_backbone_names", "lr_linear_proj_names"):
        check_parameter_names(model, f"--{flag}", getattr(args, flag))
    groups = parameter_groups(
        model,
        args.lr,
        args.lr_backbone,
        args.lr_backbone_names,
        args.lr_linear_proj_names,
        args.lr_linear_proj_mult,
    )
    # Fused: one kernel a group rather than a dozen a tensor, which for a small model is a good part of a step.
    settings = {"lr": args.lr, "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.SGD(groups, momentum=0.9, **settings) if args.sgd else torch.optim.AdamW(groups, **settings)
    if args.sgd:
        # From zero is what a first step does anyway. Where that step is skipped, PyTorch would leave the momentum as
        # the memory happened to be.
        for parameter in (p for group in groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def set_lr(epoch: int, step: int, steps: int) -> None:
        factor = learning_rate_factor(
            args.lr_schedule,
            epoch * steps + step,
            epoch,
            args.epochs * steps,
            args.lr_drop,
            args.warmup_steps,
            args.lr_drop_epochs,
        )
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    return Optimization(optimizer, set_lr, args.amp, scaler, args.clip_max_norm, args.accumulate, average)


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Keep the parameters as they are whose name contains one of the parts (`--freeze`).

    Raises:
        UserError: no parameter's name contains a part, or nothing would be left to train.
    """
    check_parameter_names(model, "--freeze", parts)
    for name, parameter in model.named_parameters():
        if any(part in name for part in parts):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"--freeze {' '.join(parts)}: nothing is left to train; name fewer parts")


def parameter_groups(
    model: nn.Module,
    lr: float,
    lr_backbone: float,
    backbone_names: Sequence[str] = ("backbone",),
    linear_proj_names: Sequence[str] = (),
    linear_proj_mult: float = 0.1,
) -> list[dict]:
    """Trained parameters, the backbone's and some linear projections' with learning rates of their own.

    Args:
        model: its parameters' names decide.
        lr, lr_backbone: learning rates.
        backbone_names: a parameter whose name contains one of these is the backbone's.
        linear_proj_names: one of the rest whose name contains one of these is a linear projection's.
        linear_proj_mult: their learning rate as a part of `lr`.

    Returns:
        the groups that have parameters, each with a `name` ("" for the rest), in the order of the reference.
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
    """Refuse a part of a name that no parameter has.

    Args:
        model: its parameters, frozen ones included, are looked at.
        flag: where the parts come from, for the message.
        parts: each must be contained in some parameter's name.

    Raises:
        UserError: naming the flag, the part and some parameters.
    """
    names = [name for name, _ in model.named_parameters()]
    for part in parts:
        if not any(part in name for name in names):
            # Every so many, so that they come from all over the model.
            some = ", ".join(names[:: max(len(names) // 6, 1)])
            raise UserError(f"{flag} {part}: no parameter's name contains it; names are, say, {some}")


def drops_until(epoch: int, lr_drop: int, drop_epochs: Sequence[int] | None) -> int:
    """How often the step schedule's rate has fallen when `epoch` epochs are done.

    Args:
        epoch: epochs done.
        lr_drop: it falls after every so many.
        drop_epochs: it falls after each of these instead; None for `lr_drop`.
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
    """What a base learning rate is multiplied by.

    Args:
        schedule: "step", a tenth after every drop; or "cosine", from 1 to 0 over the whole run.
        step: optimizer steps done before, in all epochs.
        epoch: epochs done before.
        total_steps: of the whole run.
        lr_drop: epochs between two drops.
        warmup_steps: the factor rises linearly from near 0 over these.
        drop_epochs: epochs after which a drop comes, in place of every `lr_drop`.

    Returns:
        in [0, 1].
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "step":
        return 0.1 ** drops_until(epoch, lr_drop, drop_epochs)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(total_steps - warmup_steps, 1)))
