"""One epoch of training, and evaluation: the loops, and nothing of the set-up around them."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from enact_common.distributed import get_world_size
from enact_common.evaluation.coco import CocoBoxEvaluator
from enact_common.logs import AverageMeter, Progress
from enact_common.nested_tensor import NestedTensor

AMP_DTYPE = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLossError(RuntimeError):
    """The loss is infinite or not a number. The message says where and which tensor was the first at fault."""


@dataclass
class Optimization:
    """All that changes weights in a step.

    Attributes:
        optimizer: over all trained parameters.
        learning_rate: called with (epoch, optimizer step in it, steps in it); sets the optimizer's rates.
        amp: a key of `AMP_DTYPE`.
        scaler: scales the loss under fp16; disabled otherwise.
        clip_max_norm: largest norm of all gradients together; 0 does not clip.
        accumulate: batches whose gradients make one step.
    """

    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int, int, int], None]
    amp: str
    scaler: torch.amp.GradScaler
    clip_max_norm: float
    accumulate: int


def autocast(device: torch.device, amp: str):
    """The mixed-precision context that `--amp` asks for."""
    return torch.autocast(device.type, dtype=AMP_DTYPE[amp], enabled=amp != "none")


def to_device(samples: NestedTensor, targets: list[dict[str, Tensor]], device: torch.device):
    """A batch on the device, without waiting for the copies."""
    targets = [{name: value.to(device, non_blocking=True) for name, value in t.items()} for t in targets]
    return samples.to(device, non_blocking=True), targets


def loss_report(losses: dict[str, Tensor], weight_dict: dict[str, float]) -> dict[str, Tensor]:
    """Losses for the log, under the original's names: weighted, the total, and unweighted with a suffix."""
    scaled = {name: value * weight_dict[name] for name, value in losses.items() if name in weight_dict}
    report = {"loss": sum(scaled.values()), **scaled}
    if "class_error" in losses:
        report["class_error"] = losses["class_error"]
    return report | {f"{name}_unscaled": value for name, value in losses.items() if name != "class_error"}


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    loader: DataLoader,
    optimization: Optimization,
    device: torch.device,
    epoch: int,
    print_freq: int,
) -> dict[str, float]:
    """Train on every batch once.

    Args:
        model: possibly wrapped in DistributedDataParallel.
        criterion: gives losses, their weights and the total.
        loader: gives (NestedTensor, targets); its sampler and data set know the epoch already.
        optimization: what changes the weights.
        device: where the model is.
        epoch: number, from 0.
        print_freq: steps between two reports.

    Returns:
        means of the losses over the epoch, and the last learning rate under `lr`.

    Raises:
        NonFiniteLossError: the loss is not finite. The weights are those before that batch.
    """
    model.train()
    criterion.train()
    meter = AverageMeter()
    optimizer, scaler = optimization.optimizer, optimization.scaler
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    group_size = optimization.accumulate
    num_batches, num_steps = len(loader), -(-len(loader) // group_size)
    progress = Progress(loader, f"epoch {epoch}", loader.batch_size * get_world_size(), print_freq)

    optimizer.zero_grad(set_to_none=True)
    for i, (samples, targets) in progress:
        step, place = divmod(i, group_size)
        if place == 0:
            optimization.learning_rate(epoch, step, num_steps)
        # The last group of an epoch may be smaller; its gradient is still a mean over its batches.
        batches_in_group = min(group_size, num_batches - step * group_size)
        complete = place == batches_in_group - 1

        samples, targets = to_device(samples, targets, device)
        wait = contextlib.nullcontext() if complete or get_world_size() == 1 else model.no_sync()
        with wait:
            with autocast(device, optimization.amp):
                outputs = model(samples)
            losses = criterion(outputs, targets)
            total = criterion.total(losses)
            if not torch.isfinite(total).item():
                # Without the wrapper, whose forward would wait for the other processes.
                alone = getattr(model, "module", model)
                where = f"epoch {epoch}, step {i}"
                raise NonFiniteLossError(describe_non_finite(alone, samples, targets, losses, where, optimization.amp))
            scaler.scale(total / batches_in_group).backward()

        if complete:
            scaler.unscale_(optimizer)
            if optimization.clip_max_norm > 0:
                nn.utils.clip_grad_norm_(parameters, optimization.clip_max_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

        meter.update(loss_report(losses, criterion.weight_dict))
        if progress.due(i):
            averages = meter.averages()
            shown = {name: averages[name] for name in ("loss", "class_error")}
            progress.show(i, {**shown, "lr": optimizer.param_groups[0]["lr"]})
    return {"lr": optimizer.param_groups[0]["lr"], **meter.synchronized()}


def describe_non_finite(
    model: nn.Module,
    samples: NestedTensor,
    targets: list[dict[str, Tensor]],
    losses: dict[str, Tensor],
    where: str,
    amp: str,
) -> str:
    """How a loss that is not finite arose: the images, the step, and the first tensor at fault.

    Runs the batch through the model once more, watching every module's output.

    Args:
        model, samples, targets, losses: of the step.
        where: the step, in words.
        amp: the precision it ran in, a key of `AMP_DTYPE`.
    """
    images = ", ".join(str(int(target["image_id"])) for target in targets if "image_id" in target)
    candidates = [("input images", samples.tensors)]
    candidates += [("target boxes", target["boxes"]) for target in targets]
    candidates += [(f"parameter {name}", parameter) for name, parameter in model.named_parameters()]
    candidates += [(f"buffer {name}", buffer) for name, buffer in model.named_buffers()]
    fault = next((name for name, tensor in candidates if not is_finite(tensor)), None)
    if fault is None:
        with autocast(samples.tensors.device, amp):
            fault = first_non_finite_output(model, samples)
    if fault is None:
        faults = (f"loss {name}" for name, value in losses.items() if not is_finite(value))
        fault = next(faults, "the weighted total")
    return (
        f"the loss is not finite at {where}, images {images}; first tensor at fault: {fault}. "
        "The last checkpoint is from before. A smaller --lr, a smaller --clip_max_norm or --amp none may help."
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite numbers."""
    return bool(torch.isfinite(tensor).all())


@torch.no_grad()
def first_non_finite_output(model: nn.Module, samples: NestedTensor) -> str | None:
    """The name of the first module whose output is not finite; None where all are."""
    found: list[str] = []

    def watch(name):
        def hook(module, inputs, output):
            tensors = output if isinstance(output, tuple | list) else [output]
            if not found and any(isinstance(t, Tensor) and t.is_floating_point() and not is_finite(t) for t in tensors):
                found.append(f"output of {name or 'the model'} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        model(samples)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    criterion: nn.Module | None,
    postprocess: nn.Module,
    loader: DataLoader,
    evaluator: CocoBoxEvaluator,
    device: torch.device,
    amp: str,
    print_freq: int,
) -> dict[str, float]:
    """Detect in every image, and hand the detections, in pixels of the original images, to the evaluator.

    Args:
        model: not wrapped.
        criterion: gives losses and their weights; None where the images have no annotations.
        postprocess: from the model's outputs and the images' sizes to detections.
        loader: gives (NestedTensor, targets).
        evaluator: collects.
        device: where the model is.
        amp: a key of `AMP_DTYPE`.
        print_freq: steps between two reports.

    Returns:
        means of the losses; empty without a criterion. The evaluator holds the detections of all processes.
    """
    model.eval()
    if criterion is not None:
        criterion.eval()
    meter = AverageMeter()
    progress = Progress(loader, "evaluation", loader.batch_size * get_world_size(), print_freq)
    for i, (samples, targets) in progress:
        image_ids = [int(target["image_id"]) for target in targets]
        sizes = torch.stack([target["orig_size"] for target in targets]).to(device, non_blocking=True)
        samples, targets = to_device(samples, targets, device)
        with autocast(device, amp):
            outputs = model(samples)
        if criterion is not None:
            meter.update(loss_report(criterion(outputs, targets), criterion.weight_dict))
        evaluator.update(image_ids, postprocess(outputs, sizes))
        if progress.due(i):
            averages = meter.averages()
            progress.show(i, {name: averages[name] for name in ("loss", "class_error") if name in averages})
    evaluator.synchronize()
    return meter.synchronized()
