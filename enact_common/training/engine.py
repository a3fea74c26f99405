"""The loops of one training epoch and of an evaluation, without the set-up around them."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from enact_common.attention.layer import EnactSelfAttention
from enact_common.attention.packed import packed_windows
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

logger = logging.getLogger(__name__)

# Steps between two returns of freed CPU memory to the system: rare enough to cost nothing.
GIVE_BACK_EVERY = 50

# Consecutive fp16 overflows after which the loss scale cannot be their cause: it starts at 2^16 and halves each time.
MAX_OVERFLOWS = 30


# Reported when all inputs, parameters, outputs and losses are finite.
GRADIENTS = "first tensor at fault: the gradients"


class NonFiniteLossError(RuntimeError):
    """The loss or a gradient is infinite or NaN. The message names the step and the first tensor at fault."""


def to_device(samples: NestedTensor, targets: list[dict[str, Tensor]], device: torch.device):
    """Move a batch to the device, without waiting for the copies.

    Labels and boxes take one copy each per batch, masks one per image. Other entries of the targets are not moved.
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
    """Return the losses under the original's log names: the total, weighted losses, and `_unscaled` losses."""
    scaled = {name: value * weight_dict[name] for name, value in losses.items() if name in weight_dict}
    report = {"loss": sum(scaled.values()), **scaled}
    if "class_error" in losses:
        report["class_error"] = losses["class_error"]
    return report | {f"{name}_unscaled": value for name, value in losses.items() if name != "class_error"}


def packs_windows(model: nn.Module) -> bool:
    """Whether a training step packs windows: a layer can, and no activations are recomputed outside of the context."""
    modules = list(model.modules())
    recomputed = any(getattr(module, "recompute", False) for module in modules)
    return not recomputed and any(isinstance(module, EnactSelfAttention) and module.packs() for module in modules)


class TrainStep:
    """A training step: forward pass, losses, backward pass, and an optimizer step once a group of batches is complete.

    The host waits for the device once per step, for the matching costs, and for what the model reads back: ENACT does
    so once per layer, unless its windows are packed (`packed_windows`). The device checks whether the loss and the
    gradients are finite and skips the optimizer step if they are not. The host reads the result in the next step, which
    costs no extra wait. An all-reduce shares the result, and whether a process was asked to stop, so all processes
    react in the same step.

    Args:
        model: possibly wrapped in DistributedDataParallel.

    Attributes:
        stop: whether a process was asked to stop, as of the last `check`.
    """

    stop = False

    def __init__(self, model: nn.Module, criterion: nn.Module, optimization: Optimization, device: torch.device):
        self.model = model
        self.criterion = criterion
        self.optimization = optimization
        self.device = device
        self.parameters = [p for group in optimization.optimizer.param_groups for p in group["params"]]
        # Pinned, because the host would wait for a copy from a GPU into pageable memory.
        self._votes = torch.zeros(2, pin_memory=device.type == "cuda")  # processes with a fault, processes to stop
        self._arrived = torch.cuda.Event() if device.type == "cuda" else None
        self._overflows = torch.zeros((), device=device)  # consecutive overflows under fp16
        self._unchecked: tuple | None = None  # the last batch, as `describe_non_finite` takes it
        self._packs = packs_windows(model)
        self._too_many = torch.zeros((), pin_memory=device.type == "cuda")  # layers with more windows than fit
        self._repeated = False  # whether a batch was run once more
        self._side = torch.cuda.Stream(device) if device.type == "cuda" and self._packs else None

    def __call__(
        self,
        samples: NestedTensor,
        targets: list[dict[str, Tensor]],
        where: str = "",
        group: int = 1,
        complete: bool = True,
    ) -> dict[str, Tensor]:
        """Process one batch, and return its losses, detached, on the device.

        Args:
            samples, targets: a batch from the loader.
            where: the step, in words, for the report.
            group: batches whose gradients are averaged in this optimizer step.
            complete: whether this is the last batch of the group.

        Raises:
            NonFiniteLossError: the previous batch had a loss or gradients that are not finite. The weights are those
                before that batch.
        """
        optimizer, scaler = self.optimization.optimizer, self.optimization.scaler
        samples, targets = to_device(samples, targets, self.device)
        wait = contextlib.nullcontext() if complete or get_world_size() == 1 else self.model.no_sync()
        with wait:
            losses = self.compute_losses(samples, targets)
            # Here, because the matching has just waited for the device, so this read costs no extra wait.
            self.check()
            total = self.criterion.total(losses)
            scaler.scale(total / group).backward()

        finite = total.detach().isfinite()
        if complete:
            finite = finite & self.step_optimizer(finite)
            optimizer.zero_grad(set_to_none=True)
        votes = torch.stack((1 - finite.float(), torch.full_like(total, stop_requested() is not None)))
        self.copy_to_host(self._votes, all_reduce_sum(votes.float()))
        losses = {name: value.detach() for name, value in losses.items()}
        self._unchecked = samples, targets, losses, where
        return losses

    def compute_losses(self, samples: NestedTensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Run the model on a batch, and return its losses.

        If packed windows do not fit in some process, all run the batch once more without packing. The running
        statistics of trained batch norms then count it twice.
        """
        if not self._packs:
            return self.criterion(self.run_model(samples), targets)
        with packed_windows() as overflows:
            outputs = self.run_model(samples)
        with self.beside():
            overflow = sum(overflows, torch.zeros((), dtype=torch.int32, device=self.device))
            self.copy_to_host(self._too_many, all_reduce_sum(overflow.float()))
        losses = self.criterion(outputs, targets)
        # Costs no wait either, for the same reason as `check`.
        self.await_copies()
        if not self._too_many:
            return losses
        if not self._repeated:
            logger.warning("a batch has too many windows for packed attention; each such batch is run once more")
            self._repeated = True
        # Free the memory of the first run.
        del outputs, losses
        return self.criterion(self.run_model(samples), targets)

    def run_model(self, samples: NestedTensor):
        """Return the model's outputs."""
        with autocast(self.device, self.optimization.amp):
            return self.model(samples)

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Context whose work on a GPU follows what is queued so far, and holds up nothing that is queued later."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            yield

    def copy_to_host(self, pinned: Tensor, numbers: Tensor) -> None:
        """Queue a copy, to be read after `await_copies`."""
        pinned.copy_(numbers, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(self.device))

    def await_copies(self) -> None:
        """Wait for the copies queued so far."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def step_optimizer(self, finite: Tensor) -> Tensor:
        """Clip the gradients and update the weights, if the loss (`finite`, bool ()) and the gradients are finite.

        Returns bool (), whether they are. Under fp16, overflows only count after `MAX_OVERFLOWS` in a row, since the
        scaler answers them with a smaller scale.
        """
        optimizer, scaler = self.optimization.optimizer, self.optimization.scaler
        scaler.unscale_(optimizer)
        # Compute the norm even without clipping: it is finite only if all gradients are.
        norm = nn.utils.clip_grad_norm_(self.parameters, self.optimization.clip_max_norm or math.inf)
        if scaler.is_enabled():
            self._overflows = torch.where(norm.isfinite(), 0.0, self._overflows + 1)
            finite = finite & (self._overflows < MAX_OVERFLOWS)
        else:
            finite = finite & norm.isfinite()
            # As the gradient scaler does: fused optimizers read it on the device and skip the step.
            optimizer.found_inf = (~finite).float()
        scaler.step(optimizer)
        scaler.update()
        if self.optimization.average is not None:
            self.optimization.average.update(getattr(self.model, "module", self.model))
        return finite

    def check(self) -> None:
        """Read the result of the last batch of all processes, and set `stop`.

        Raises:
            NonFiniteLossError: the loss or a gradient is not finite in some process; all processes raise the same
                message.
        """
        batch, self._unchecked = self._unchecked, None
        if batch is None:
            return
        self.await_copies()
        faults, stops = self._votes.tolist()
        self.stop = stops > 0
        if faults:
            # Unwrap the model: the wrapper's forward would wait for the other processes.
            unwrapped = getattr(self.model, "module", self.model)
            report = describe_non_finite(unwrapped, *batch, self.optimization.amp)
            # Gradients are all-reduced, so every rank has the fault; prefer the rank with an earlier one.
            reports = gather_objects(report)
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
        loader: yields (NestedTensor, targets); its sampler and data set are already set to the epoch, and skip the
            `first` batches.
        epoch: number, from 0.
        print_freq: steps between two progress lines.
        meter: the losses of the epoch's batches so far, empty at its start; updated in place.
        first: batches of the epoch that were done before a resume.
        after_step: called in all processes after each optimizer step except the epoch's last, with the number of
            batches done in the epoch, and whether a process was asked to stop.

    Returns:
        mean losses over the epoch, and the last learning rate under `lr`.

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
        # The last group of an epoch may be smaller; its gradient is still the mean over its batches.
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
            # A single process needs no all-reduce, so it stops one step earlier.
            stop = step.stop or (get_world_size() == 1 and stop_requested() is not None)
            if stop:
                step.check()
            after_step(i + 1, stop)
    step.check()
    averages = loss_report(meter.synchronized(), criterion.weight_dict)
    return {"lr": optimizer.param_groups[0]["lr"], **averages}


def keep_frozen_norms(model: nn.Module) -> None:
    """Freeze the statistics of batch norms whose parameters are frozen (`--freeze`). Call it after `model.train()`."""
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
    """Return the message about a loss that is not finite: the step, the images, and the first tensor at fault.

    Runs the batch through the model once more, in the precision `amp`, and checks the output of every module.
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
        "The last checkpoint is not affected. Try a smaller --lr, a smaller --clip_max_norm or --amp none."
    )


def floats_in(output) -> Iterator[Tensor]:
    """Yield the floating-point tensors in a module's output."""
    if isinstance(output, NestedTensor):
        output = output.tensors
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict | list | tuple):
        for part in output.values() if isinstance(output, dict) else output:
            yield from floats_in(part)


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite."""
    return bool(torch.isfinite(tensor).all())


@torch.no_grad()
def first_non_finite_output(model: nn.Module, samples: NestedTensor) -> str | None:
    """Return the first module whose output is not finite, by name and type; None if all outputs are finite."""
    faults: list[str] = []

    def watch(name):
        def hook(module, inputs, output):
            if not faults and not all(is_finite(t) for t in floats_in(output)):
                faults.append(f"output of {name or 'the model'} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    # In training mode they would wait for the other processes, which may not run the model here.
    sync_norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm) and module.training]
    try:
        for module in sync_norms:
            module.eval()
        model(samples)
    finally:
        for module in sync_norms:
            module.train()
        for handle in handles:
            handle.remove()
    return faults[0] if faults else None


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
    """Run the model on every image and pass the detections, in pixels of the original images, to the evaluator.

    Args:
        model: without a wrapper.
        criterion: computes the losses and their weights; None for images without annotations.
        postprocessors: "bbox" turns the model's outputs and the image sizes into detections; models with masks also
            have "segm", which adds the masks, or "panoptic", which makes segments.
        loader: yields (NestedTensor, targets), or None for a batch of unreadable images. Processes may have different
            numbers of batches.
        evaluator: collects the detections; afterwards it holds those of all processes.
        amp: a key of `AMP_DTYPE`.
        print_freq: steps between two progress lines.
        panoptic: collects the segments of a model with the post-processor "panoptic"; None for other models.

    Returns:
        mean losses; empty without a criterion.

    Raises:
        Stopped: a process was asked to stop; raised in all processes.
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
        raise Stopped("the evaluation was not completed, and none of its results are written")
    evaluator.synchronize()
    if panoptic is not None:
        panoptic.synchronize()
    return report(meter.synchronized())
