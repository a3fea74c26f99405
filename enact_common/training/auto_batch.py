"""`--batch_size auto`: find the largest batch whose training step fits into a GPU's memory.

The images per optimizer step stay what was asked for: the batch is a divisor of them, and `--accumulate` makes up the
rest. So the learning rate's meaning does not depend on the GPU.
"""

import argparse
import bisect
import contextlib
import gc
import logging
import math
from collections.abc import Callable, Sequence

import torch
from torchvision import tv_tensors

from enact_common.attention.packed import packed_windows
from enact_common.cli.flags import AUTO_BATCH, with_flags
from enact_common.data.coco import CocoDetection, collate
from enact_common.data.transforms import CROP_RANGE, to_model_input
from enact_common.training.engine import keep_frozen_norms, packs_windows, to_device
from enact_common.training.setup import Network
from enact_common.utils.device import autocast, peak_memory, start_counting_memory
from enact_common.utils.distributed import get_world_size
from enact_common.utils.errors import UserError

logger = logging.getLogger("enact")

# The fraction of the memory that stays free: blocks of many sizes fragment it in a long training.
MARGIN = 0.1


def check_auto_device(args: argparse.Namespace, device: torch.device) -> None:
    """Refuse `--batch_size auto` without a GPU and with several processes."""
    if args.batch_size != AUTO_BATCH:
        return
    if device.type != "cuda":
        raise UserError(f"--batch_size {AUTO_BATCH} measures a GPU's memory: pass a number with --device {args.device}")
    if get_world_size() > 1:
        raise UserError(
            f"--batch_size {AUTO_BATCH} works in a single process: run it once on one GPU, and pass the --batch_size "
            "that it prints"
        )


def resolve_batch(
    args: argparse.Namespace, network: Network, train_set: CocoDetection, device: torch.device
) -> argparse.Namespace:
    """Return the arguments with the largest `--batch_size` that fits and the `--accumulate` that goes with it.

    The network's weights, buffers and random numbers stay as they are.

    Raises:
        UserError: not even one image fits.
    """
    effective = args.effective_batch_size or args.published_batch
    candidates = [n for n in range(1, min(effective, len(train_set)) + 1) if effective % n == 0]
    height, width = worst_shape(args, train_set.sizes)
    objects = min(train_set.most_objects, network.model.num_queries)

    def step_fits(batch: int) -> bool:
        # One image is never padded, so it is not both as high and as wide as the worst batch.
        shape = (height, width) if batch > 1 else (short_side(args), max(height, width))
        complete = fits(lambda: trial_step(network, args, device, batch, shape, objects), device)
        words = batch, *shape, "fits" if complete else "does not fit"
        logger.info("--batch_size auto: a step with %d images of %d x %d pixels (height x width) %s", *words)
        return complete

    # All candidates below one that fits fit too.
    fitting = bisect.bisect_left(candidates, True, key=lambda batch: not step_fits(batch))
    if not fitting:
        raise UserError(
            f"--batch_size {AUTO_BATCH}: not even one image of {short_side(args)} x {max(height, width)} pixels fits "
            f"into the memory of {device}: pass --amp bf16, --checkpoint_activations, or smaller --train_sizes and "
            "--max_size"
        )
    batch = candidates[fitting - 1]
    accumulate = effective // batch
    logger.info("--batch_size auto: --batch_size %d --accumulate %d, %d images per step", batch, accumulate, effective)
    return with_flags(args, batch_size=batch, accumulate=accumulate, effective_batch_size=None)


def fits(step: Callable[[], None], device: torch.device) -> bool:
    """Whether a step leaves `MARGIN` of the GPU's free memory free."""
    give_back(device)
    available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)
    start_counting_memory(device)
    complete = True
    try:
        step()
    except torch.cuda.OutOfMemoryError:
        complete = False
    peak = peak_memory(device)
    # After the except block, as the error holds the step's tensors.
    give_back(device)
    return complete and peak <= (1 - MARGIN) * available


def give_back(device: torch.device) -> None:
    """Return unused GPU memory, so that the next step starts from the same state."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def short_side(args: argparse.Namespace) -> int:
    """The largest shorter side of a training image, in pixels."""
    return max(args.train_sizes) if args.augmentation else args.eval_size


def worst_shape(args: argparse.Namespace, sizes: Sequence[tuple[float, float]]) -> tuple[int, int]:
    """Return the (height, width) in pixels that a batch is padded to at worst.

    `sizes` are (width, height) of each image; infinite if unknown, which counts as any shape.
    """
    short, ratios = short_side(args), [1.0, 1.0]
    for width, height in sizes:
        known = math.isfinite(width)
        ratios[0] = max(ratios[0], height / width if known else math.inf)
        ratios[1] = max(ratios[1], width / height if known else math.inf)
    if args.augmentation:
        crop = CROP_RANGE[1] / CROP_RANGE[0]
        ratios = [max(ratio, crop) for ratio in ratios]
    return tuple(max(short, math.ceil(min(args.max_size, short * ratio))) for ratio in ratios)


def trial_step(
    network: Network, args: argparse.Namespace, device: torch.device, batch: int, shape: tuple[int, int], objects: int
) -> None:
    """Run a forward and a backward pass on noise, with memory for the optimizer's state, and leave no trace.

    The batch has images of `shape` (height, width) pixels, each with this number of objects. The network's model is in
    training mode afterwards.
    """
    model, criterion = network.model, network.criterion
    buffers = [buffer.clone() for buffer in model.buffers()]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    keep_frozen_norms(model)
    criterion.train()
    try:
        # Dropout must not change the random numbers of the training.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            samples, targets = to_device(*noise_batch(args, batch, shape, objects), device)
            with autocast(device, args.amp), packed_windows() if packs_windows(model) else contextlib.nullcontext():
                outputs = model(samples)
            criterion.total(criterion(outputs, targets)).backward()
        # AdamW keeps two moments of each parameter, SGD one.
        state = [torch.zeros_like(parameter) for parameter in parameters for _ in range(1 if args.sgd else 2)]
        del state
    finally:
        for parameter in parameters:
            parameter.grad = None
        with torch.no_grad():
            for buffer, old in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(old)


def noise_batch(args: argparse.Namespace, batch: int, shape: tuple[int, int], objects: int):
    """Return a batch as the loader's, of noise images of `shape` (height, width) pixels without padding."""
    height, width = shape
    items = []
    for _ in range(batch):
        corner, extent = torch.rand(2, objects, 2) * 0.4 + 0.1  # fractions of the image
        boxes = torch.cat((corner, corner + extent), dim=1) * torch.tensor([width, height, width, height])  # (n, 4)
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=shape),
            "labels": torch.randint(args.num_classes, (objects,)),
            "orig_size": torch.tensor(shape),
        }
        if args.masks:
            target["masks"] = tv_tensors.Mask(torch.ones(objects, height, width, dtype=torch.bool))
        image = torch.randint(256, (3, height, width), dtype=torch.uint8)
        items.append(to_model_input(tv_tensors.Image(image), target))
    return collate(items)
