"""Detectors built as in training and evaluation, and batches of noise or real images for them."""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms import v2

from enact_common.attention.clustering import EntropyClustering
from enact_common.attention.layer import EnactSelfAttention
from enact_common.benchmark.eager import replaced
from enact_common.cli.types import natural_int, positive_int
from enact_common.data.annotations import find_split
from enact_common.data.coco import CocoDetection, collate
from enact_common.data.transforms import to_model_input
from enact_common.models import backbone
from enact_common.models.detector import num_classes_of
from enact_common.nested_tensor import NestedTensor
from enact_common.training.engine import TrainStep
from enact_common.training.optimization import build_optimization
from enact_common.utils.device import AMP_DTYPE, autocast, check_precision, find_device
from enact_common.utils.errors import UserError
from enact_common.variants import VARIANTS, load_variant

# Batch sizes of the published measurements.
BATCH_SIZES = {"detr": 8, "conditional": 8, "anchor": 4}

NAMES = {"detr": "DETR", "conditional": "Conditional DETR", "anchor": "Anchor DETR"}

# Objects in an image of noise: COCO's mean.
OBJECTS = 7

Batch = tuple[NestedTensor, list[dict[str, Tensor]]]

# Flags that several benchmarks share.
COMMON_FLAGS = {
    "size": {"type": positive_int, "nargs": 2, "metavar": ("H", "W"), "help": "image size, pixels (default: 800 1333)"},
    "batch": {"type": positive_int, "metavar": "N", "help": "images per batch (default: %(default)s)"},
    "amp": {"choices": tuple(AMP_DTYPE), "help": "mixed precision (default: %(default)s)"},
    "device": {"help": "cpu, cuda, cuda:1, ... (default: a GPU if there is one)"},
    "repeat": {"type": positive_int, "metavar": "N", "help": "timed runs of each row (default: %(default)s)"},
    "warmup": {
        "type": natural_int, "metavar": "N", "help": "untimed runs before the timed ones (default: %(default)s)"
    },
}  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """The settings of one measured row.

    Attributes:
        row: the row's name in its benchmark.
        args: the variant's parsed arguments.
        size: (height, width) of the images, pixels.
        repeat, warmup: numbers of timed runs, and of untimed runs before them.
        real: use images of `args.coco_path` instead of noise.
        graphed: run the encoder as CUDA graphs.
        objects: number of objects in each image of noise.
    """

    variant: str
    row: str
    args: argparse.Namespace
    size: tuple[int, int]
    repeat: int
    warmup: int
    real: bool = False
    graphed: bool = False
    objects: int = OBJECTS

    @property
    def name(self) -> str:
        """The model's name in the published table."""
        return model_name(self.variant, self.args)

    def batch(self) -> Batch:
        """Return the images and targets to measure with."""
        return coco_batch(self.args, self.size) if self.real else noise_batch(self.args, self.size, self.objects)


def parse_flags(variant: str, device: str, flags: Sequence[str], overrides: Sequence[str]) -> argparse.Namespace:
    """Parse and check a variant's flags: the user's, then `overrides` of the benchmark.

    Three defaults differ from the variant's: the batch size is the published one, the backbone has random weights, and
    the device is `device`.

    Raises:
        UserError: the flags do not work together, or not on this machine.
        SystemExit: the variant has no such flag.
    """
    parser = load_variant(variant).main.get_args_parser()
    parser.prog = f"python {VARIANTS[variant][0]}/main.py"
    parser.set_defaults(device=device, batch_size=BATCH_SIZES[variant], backbone_weights="none")
    args = parser.parse_args([*flags, *overrides])
    parser.check(args)
    check_precision(args.amp, find_device(args.device))
    return args


def refuse_flags(flags: Sequence[str], refused: dict[str, str]) -> None:
    """Reject model flags that the benchmark sets itself; `refused` maps them to the advice for the user."""
    for word in flags:
        flag = word.partition("=")[0]
        if flag in refused:
            raise UserError(f"{flag} after --: {refused[flag]}")


def add_common_flags(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add flags of `COMMON_FLAGS` with their defaults."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default, **COMMON_FLAGS[name])


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add a positional argument that collects the variant's flags after `--`."""
    parser.add_argument("flags", nargs="*", metavar="FLAG", help="after --: model flags, as in the variant's main.py")


def model_name(variant: str, args: argparse.Namespace) -> str:
    """Return the model's name in the published table, such as "Anchor DETR-DC5, R50"."""
    return f"{NAMES[variant]}-{'DC5' if args.dilation else 'C5'}, R{args.backbone.removeprefix('resnet')}"


class Fit:
    """Transform that resizes an image to the largest size that fits (height, width) pixels, keeping the aspect
    ratio."""

    def __init__(self, height: int, width: int):
        self.limits = (height, width)

    def __call__(self, image: tv_tensors.Image, target: dict) -> tuple[tv_tensors.Image, dict]:
        sides = image.shape[-2:]
        scale = min(limit / side for limit, side in zip(self.limits, sides, strict=True))
        # Clamp, since rounding could exceed the rectangle or give a side of 0.
        shape = [max(min(round(side * scale), limit), 1) for limit, side in zip(self.limits, sides, strict=True)]
        resize = v2.functional.resize
        return resize(image, shape, antialias=True), {**target, "boxes": resize(target["boxes"], shape)}


def noise_batch(args: argparse.Namespace, size: tuple[int, int], objects: int = OBJECTS) -> Batch:
    """Return a batch of unpadded noise images (height, width) with random objects, seeded with `args.seed`.

    The images pass through the last transform of the data sets, so the batch looks like a loader's.
    """
    generator = torch.Generator().manual_seed(args.seed)
    height, width = size
    items = []
    for _ in range(args.batch_size):
        image = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)
        corner, extent = torch.rand(2, objects, 2, generator=generator)  # fractions of the image
        boxes = torch.cat((0.6 * corner, 0.6 * corner + 0.1 + 0.3 * extent), dim=1)  # xyxy
        boxes = boxes * torch.tensor([width, height, width, height])
        target = {
            "orig_size": torch.tensor([height, width]),
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.randint(num_classes_of(args), (objects,), generator=generator),
        }
        items.append(to_model_input(tv_tensors.Image(image), target))
    return collate(items)


def coco_batch(args: argparse.Namespace, size: tuple[int, int]) -> Batch:
    """Return the first validation images of `args.coco_path` with their annotations, padded to one size.

    Each image is resized to fit (height, width). `args.num_classes` is set to the data set's.

    Raises:
        UserError: the data are invalid, or there are fewer images than the batch size.
    """
    transforms = v2.Compose([Fit(*size), to_model_input])
    dataset = CocoDetection(
        *find_split(args.coco_path, "val"), transforms, num_classes=args.num_classes, limit=args.batch_size
    )
    if len(dataset) < args.batch_size:
        raise UserError(
            f"--coco_path {args.coco_path}: has {len(dataset)} validation images, a batch needs {args.batch_size}; "
            "pass a smaller --batch"
        )
    args.num_classes = dataset.label_map.num_classes
    samples, targets = collate([dataset[i] for i in range(args.batch_size)])
    height, width = samples.mask.shape[1:]
    padding = (0, size[1] - width, 0, size[0] - height)  # right and bottom
    return NestedTensor(F.pad(samples.tensors, padding), F.pad(samples.mask, padding, value=True)), targets


def build_detector(
    variant: str, args: argparse.Namespace, samples: NestedTensor, device: torch.device
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Build (model, criterion, post-processing) on a device, seeded with `args.seed`; `prepare` is not called.

    The first image of `samples` sets the batch-norm statistics of a random backbone.
    """
    torch.manual_seed(args.seed)
    model, criterion, postprocessors = load_variant(variant).models.build_model(args)
    model.to(device)
    if args.backbone_weights == "none":
        set_frozen_statistics(model, NestedTensor(samples.tensors[:1], samples.mask[:1]).to(device))
    return model, criterion.to(device), postprocessors["bbox"]


@torch.no_grad()
def set_frozen_statistics(model: nn.Module, samples: NestedTensor) -> None:
    """Set the statistics of each frozen batch norm of a detector to those of its input, as with trained weights.

    With the initial mean 0 and variance 1, the activations of a random ResNet-101 grow to tens of thousands. Attention
    and clustering would be dominated by a few extreme tokens, and fp16 would overflow.
    """

    def measure_and_norm(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
        x = conv(x)
        if isinstance(norm, FrozenBatchNorm2d):
            var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
        return norm(x)

    model.eval()
    with replaced(backbone, {"convolve_and_norm": measure_and_norm}):
        model(samples)


def build_train_step(
    model: nn.Module, criterion: nn.Module, args: argparse.Namespace, device: torch.device
) -> TrainStep:
    """Return the training step of a run, for a prepared model and its criterion."""
    model.train()
    criterion.train()
    return TrainStep(model, criterion, build_optimization(model, args, device), device)


@contextlib.contextmanager
def counted_clusters(model: nn.Module) -> Iterator[list[int]]:
    """Yield a list to which each call of a clustering layer appends its number of clusters per image."""
    counts: list[int] = []

    def count_keys(projection: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        counts.append(inputs[0].shape[1])

    def count_pooled(clustering: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        counts.append(output[0].shape[1])

    handles = []
    for module in model.modules():
        if isinstance(module, EnactSelfAttention):
            # The layer takes and returns tokens; its key projection gets the M clusters (batch, M, d).
            handles.append(module.W_k.register_forward_hook(count_keys))
        elif isinstance(module, EntropyClustering):
            handles.append(module.register_forward_hook(count_pooled))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def inspect_forward(model: nn.Module, samples: NestedTensor, amp: str) -> dict:
    """Count the operations, tokens and clusters of a detector's forward pass, in evaluation mode.

    Call it before `prepare`: hooks do not run in a compiled model.

    Returns:
        `flops`: per image, two for each multiply-add, of matrix products, convolutions and unfused attention;
        elementwise operations are not counted. `tokens`: cells of the encoder's feature map. `clusters`: number of
        clusters in each ENACT layer.
    """
    tokens = []

    def count_tokens(projection: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        tokens.append(output.shape[-2] * output.shape[-1])

    # Anchor DETR has one projection per level; all levels have the same size.
    projection = model.input_proj[-1] if isinstance(model.input_proj, nn.ModuleList) else model.input_proj
    handle = projection.register_forward_hook(count_tokens)
    # FlopCounterMode fails under no_grad if a parameter requires a gradient.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    counter, precision = FlopCounterMode(display=False), autocast(samples.tensors.device, amp)
    try:
        with handle, counted_clusters(model) as clusters, sdpa_kernel(SDPBackend.MATH), precision, counter:
            model(samples)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return {"flops": counter.get_total_flops() / len(samples.mask), "tokens": tokens[-1], "clusters": clusters}
