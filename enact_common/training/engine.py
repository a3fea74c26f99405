"""One epoch of training, and evaluation: the loops, and nothing of the set-up around them."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from enact_common.evaluation.coco import CocoBoxEvaluator
from enact_common.evaluation.panoptic import PanopticEvaluator
from enact_common.nested_tensor import NestedTensor
from enact_common.training.logs import AverageMeter
from enact_common.training.optimization import Optimization
from enact_common.utils.acceleration import BATCH_NORMS, give_back_freed_memory
from enact_common.utils.device import autocast
from enact_common.utils.distributed import all_reduce_sum, gather_objects, get_world_size
from enact_common.utils.progress import Progress
from enact_common.utils.signals import Stopped, stop_requested

# Steps after which a CPU's freed memory is given back: rare enough to cost nothing.
GIVE_BACK_EVERY = 50

# Overflows in a row that fp16's gradient scaler may answer with half the scale. It begins at 2^16, so that after so
# many the scale is no cause any more.
MAX_OVERFLOWS = 30


# Where no tensor before them is at fault.
GRADIENTS = "first tensor at fault: the gradients"


class NonFiniteLossError(RuntimeError):
    """The loss is infinite or not a number. The message says where and which tensor was the first at fault."""


def to_device(samples: NestedTensor, targets: list[dict[str, Tensor]], device: torch.device):
    """A batch on the device, without waiting for the copies.

    Of the targets, all objects' labels and boxes go in one copy each, masks in one an image; what else they hold stays
    where it is.
    """
    counts = [len(target["labels"]) for target in targets]
    moved = {
        name: torch.cat([target[name] for target in targets]).to(device, non_blocking=True).split(counts)
        for name in ("labels", "boxes")
    }
    masks = [{"masks": t["masks"].to(device, non_blocking=True)} if "masks" in t else {} for t in targets]
    targets = [
        {**target, **masks[i], **{name: parts[i] for name, parts in moved.items()}} for i, target in enumerate(targets)
    ]
    return samples.to(device, non_blocking=True), targets


def loss_report(losses: dict[str, float], weight_dict: dict[str, float]) -> dict[str, float]:
    """Losses for the log, under the original's names: weighted, the total, and unweighted with a suffix."""
    scaled = {name: value * weight_dict[name] for name, value in losses.items() if name in weight_dict}
    report = {"loss": sum(scaled.values()), **scaled}
    if "class_error" in losses:
        report["class_error"] = losses["class_error"]
    return report | {f"{name}_unscaled": value for name, value in losses.items() if name != "class_error"}


@dataclass
class Batch:
    """What a report about a loss that is not finite needs to know of its batch."""

    samples: NestedTensor
    targets: list[dict[str, Tensor]]
    losses: dict[str, Tensor]
    where: str


class TrainStep:
    """Forward pass, losses, backward pass, and a step of the optimizer where a group of batches is complete.

    Beside what a model reads back itself (ENACT, once a layer), the host waits for the device once a step, for the
    matching costs. Whether the loss and the gradients were finite is decided on the device, which then leaves the
    weights alone; the host learns of it in the next step, when the device has passed that point anyway. In the same
    way processes tell one another that a loss is not finite, or that they were asked to stop: all learn of both in
    the same step.

    Args:
        model: possibly wrapped in DistributedDataParallel.
        criterion: gives losses, their weights and the total.
        optimization: what changes the weights.
        device: where the model is.

    Attributes:
        stop: some process was asked to stop, as of the last `check`.
    """

    stop = False

    def __init__(self, model: nn.Module, criterion: nn.Module, optimization: Optimization, device: torch.device):
        self.model = model
        self.criterion = criterion
        self.optimization = optimization
        self.device = device
        self.parameters = [p for group in optimization.optimizer.param_groups for p in group["params"]]
        # Page-locked, or a copy from a GPU into it would be waited for.
        self._votes = torch.zeros(2, pin_memory=device.type == "cuda")  # processes with a fault, and asked to stop
        self._arrived = torch.cuda.Event() if device.type == "cuda" else None
        self._overflows = torch.zeros((), device=device)  # in a row, under fp16
        self._unchecked: Batch | None = None

    def __call__(
        self,
        samples: NestedTensor,
        targets: list[dict[str, Tensor]],
        where: str = "",
        group: int = 1,
        complete: bool = True,
    ) -> dict[str, Tensor]:
        """One batch.

        Args:
            samples, targets: as the loader gives them.
            where: the step, in words, for the report.
            group: batches whose gradients make this step of the optimizer; their mean counts.
            complete: this is the last of them.

        Returns:
            the losses, without gradient, on the device.

        Raises:
            NonFiniteLossError: the batch before had a loss or gradients that are not finite. The weights are those
                before that batch.
        """
        optimizer, scaler = self.optimization.optimizer, self.optimization.scaler
        samples, targets = to_device(samples, targets, self.device)
        wait = contextlib.nullcontext() if complete or get_world_size() == 1 else self.model.no_sync()
        with wait:
            with autocast(self.device, self.optimization.amp):
                outputs = self.model(samples)
            losses = self.criterion(outputs, targets)
            # The matching has waited for the device, so this does not.
            self.check()
            total = self.criterion.total(losses)
            scaler.scale(total / group).backward()

        finite = total.detach().isfinite()
        if complete:
            finite = finite & self.step_optimizer(finite)
            optimizer.zero_grad(set_to_none=True)
        votes = torch.stack((1 - finite.float(), torch.full_like(total, stop_requested() is not None)))
        self._votes.copy_(all_reduce_sum(votes.float()), non_blocking=True)
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(self.device))
        losses = {name: value.detach() for name, value in losses.items()}
        self._unchecked = Batch(samples, targets, losses, where)
        return losses

    def step_optimizer(self, finite: Tensor) -> Tensor:
        """Clip the gradients and change the weights, unless the loss or the gradients are not finite.

        Args:
            finite: bool (), whether the loss is.

        Returns:
            bool (), whether the gradients are too. Under fp16, where overflows make the scaler try a smaller scale,
            whether it still has reason to.
        """
        optimizer, scaler = self.optimization.optimizer, self.optimization.scaler
        scaler.unscale_(optimizer)
        # Without a limit, the norm is wanted all the same: it is finite where all gradients are.
        norm = nn.utils.clip_grad_norm_(self.parameters, self.optimization.clip_max_norm or math.inf)
        if scaler.is_enabled():
            self._overflows = torch.where(norm.isfinite(), 0.0, self._overflows + 1)
            finite = finite & (self._overflows < MAX_OVERFLOWS)
        else:
            finite = finite & norm.isfinite()
            # What the gradient scaler sets, too: fused optimizers look at it on the device.
            optimizer.found_inf = (~finite).float()
        scaler.step(optimizer)
        scaler.update()
        if self.optimization.average is not None:
            self.optimization.average.update(getattr(self.model, "module", self.model))
        return finite

    def check(self) -> None:
        """Learn what became of the last batch in all processes: report a loss or gradients that were not finite, and
        set `stop`.

        Raises:
            NonFiniteLossError: they were not, in this process or another; in all with the same message.
        """
        batch, self._unchecked = self._unchecked, None
        if batch is None:
            return
        if self._arrived is not None:
            self._arrived.synchronize()
        faults, stops = self._votes.tolist()
        self.stop = stops > 0
        if faults:
            # Without the wrapper, whose forward would wait for the other processes.
            alone = getattr(self.model, "module", self.model)
            found = describe_non_finite(
                alone, batch.samples, batch.targets, batch.losses, batch.where, self.optimization.amp
            )
            # Of gradients, each has the sum of all; what lies before them is the cause.
            reports = gather_objects(found)
            raise NonFiniteLossError(next((text for text in reports if GRADIENTS not in text), reports[0]))


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    loader: DataLoader,
    optimization: Optimization,
    device: torch.device,
    epoch: int,
    print_freq: int,
    meter: AverageMeter,
    first: int = 0,
    after_step: Callable[[int, bool], None] | None = None,
) -> dict[str, float]:
    """Train on every batch once.

    Args:
        model: possibly wrapped in DistributedDataParallel.
        criterion: gives losses, their weights and the total.
        loader: gives (NestedTensor, targets); its sampler and data set know the epoch already, and that `first`
            batches of it were done.
        optimization: what changes the weights.
        device: where the model is.
        epoch: number, from 0.
        print_freq: steps between two reports.
        meter: holds the losses of the batches that were done, none at an epoch's beginning; changed in place.
        first: batches that were done before.
        after_step: called after each step of the optimizer with the batches done in the epoch, and whether some
            process was asked to stop, all processes alike.

    Returns:
        means of the losses over the epoch, and the last learning rate under `lr`.

    Raises:
        NonFiniteLossError: the loss or the gradients are not finite. The weights are those before that batch.
    """
    model.train()
    keep_frozen_norms(model)
    criterion.train()
    step = TrainStep(model, criterion, optimization, device)
    optimizer, group_size = optimization.optimizer, optimization.accumulate
    num_batches, num_steps = len(loader), -(-len(loader) // group_size)
    progress = Progress(loader, f"epoch {epoch}", loader.batch_size * get_world_size(), print_freq, first)

    optimizer.zero_grad(set_to_none=True)
    for i, (samples, targets) in progress:
        number, place = divmod(i, group_size)
        if place == 0:
            optimization.learning_rate(epoch, number, num_steps)
        # The last group of an epoch may be smaller; its gradient is still a mean over its batches.
        group = min(group_size, num_batches - number * group_size)
        if device.type == "cpu" and i % GIVE_BACK_EVERY == 0:
            give_back_freed_memory()
        complete = place == group - 1
        meter.update(step(samples, targets, f"epoch {epoch}, step {i}", group, complete))
        if progress.due(i):
            averages = loss_report(meter.averages(), criterion.weight_dict)
            shown = {name: averages[name] for name in ("loss", "class_error")}
            progress.show(i, {**shown, "lr": optimizer.param_groups[0]["lr"]})
        if complete and after_step is not None and i + 1 < num_batches:
            # Alone, this process need not wait a step to know.
            stop = step.stop or (get_world_size() == 1 and stop_requested() is not None)
            if stop:
                step.check()
            after_step(i + 1, stop)
    step.check()
    averages = loss_report(meter.synchronized(), criterion.weight_dict)
    return {"lr": optimizer.param_groups[0]["lr"], **averages}


def keep_frozen_norms(model: nn.Module) -> None:
    """Let batch norms that do not train keep their statistics too (`--freeze`), after `model.train()`."""
    for module in model.modules():
        if isinstance(module, BATCH_NORMS) and not any(p.requires_grad for p in module.parameters()):
            module.eval()


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
        fault = next(faults, None)
    at_fault = GRADIENTS if fault is None else f"first tensor at fault: {fault}"
    return (
        f"the loss or its gradients are not finite at {where}, images {images}; {at_fault}. "
        "The last checkpoint is from before. A smaller --lr, a smaller --clip_max_norm or --amp none may help."
    )


def floats_in(output) -> Iterator[Tensor]:
    """The floating-point tensors of what a module returned."""
    if isinstance(output, NestedTensor):
        output = output.tensors
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict | list | tuple):
        for part in output.values() if isinstance(output, dict) else output:
            yield from floats_in(part)


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite numbers."""
    return bool(torch.isfinite(tensor).all())


@torch.no_grad()
def first_non_finite_output(model: nn.Module, samples: NestedTensor) -> str | None:
    """The name of the first module whose output is not finite; None where all are."""
    found: list[str] = []

    def watch(name):
        def hook(module, inputs, output):
            if not found and not all(is_finite(t) for t in floats_in(output)):
                found.append(f"output of {name or 'the model'} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    # Training, they would wait for the other processes, which may have found the fault without running the model.
    waiting = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm) and module.training]
    try:
        for module in waiting:
            module.eval()
        model(samples)
    finally:
        for module in waiting:
            module.train()
        for handle in handles:
            handle.remove()
    return found[0] if found else None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    criterion: nn.Module | None,
    postprocessors: dict[str, nn.Module],
    loader: DataLoader,
    evaluator: CocoBoxEvaluator,
    device: torch.device,
    amp: str,
    print_freq: int,
    panoptic: PanopticEvaluator | None = None,
) -> dict[str, float]:
    """Detect in every image, and hand the detections, in pixels of the original images, to the evaluator.

    Args:
        model: not wrapped.
        criterion: gives losses and their weights; None where the images have no annotations.
        postprocessors: "bbox", from the model's outputs and the images' sizes to detections, and for models with masks
            "segm", which adds theirs, or "panoptic".
        loader: gives (NestedTensor, targets), or None for images that cannot be read. Processes can have different
            numbers of batches.
        evaluator: collects.
        device: where the model is.
        amp: a key of `AMP_DTYPE`.
        print_freq: steps between two reports.
        panoptic: collects segments, for models that find some; there is "panoptic" among the postprocessors then.

    Returns:
        means of the losses; empty without a criterion. The evaluator holds the detections of all processes.

    Raises:
        Stopped: some process was asked to stop, in all processes alike.
    """
    model.eval()
    if criterion is not None:
        criterion.eval()
    meter = AverageMeter()

    def report(means: dict[str, float]) -> dict[str, float]:
        return {} if criterion is None else loss_report(means, criterion.weight_dict)

    images_per_step = loader.batch_sampler.batch_size * get_world_size()
    progress = Progress(loader, "evaluation", images_per_step, print_freq)
    for i, batch in progress:
        if stop_requested() is not None:
            break
        if batch is None:
            continue
        samples, targets = batch
        image_ids = [int(target["image_id"]) for target in targets]
        model_sizes = torch.stack([target["size"] for target in targets])
        sizes = torch.stack([target["orig_size"] for target in targets]).to(device, non_blocking=True)
        samples, targets = to_device(samples, targets, device)
        with autocast(device, amp):
            outputs = model(samples)
        if criterion is not None:
            meter.update(criterion(outputs, targets))
        results = postprocessors["bbox"](outputs, sizes)
        if "segm" in postprocessors:
            results = postprocessors["segm"](results, outputs, model_sizes, sizes)
        evaluator.update(image_ids, results)
        if panoptic is not None:
            panoptic.update(image_ids, postprocessors["panoptic"](outputs, model_sizes, sizes))
        if progress.due(i):
            averages = report(meter.averages())
            progress.show(i, {name: averages[name] for name in ("loss", "class_error") if name in averages})
    if any(gather_objects(stop_requested() is not None)):
        raise Stopped("the evaluation has not come to its end, nothing of it is written")
    evaluator.synchronize()
    if panoptic is not None:
        panoptic.synchronize()
    return report(meter.synchronized())
