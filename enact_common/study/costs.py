"""Costs of an arm: a training step at the study's size, and an encoder layer at the published size."""

import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from enact_common.benchmark.detectors import counted_clusters
from enact_common.benchmark.measuring import MemoryMeter, synchronizer, take_turns
from enact_common.benchmark.scaling import blur
from enact_common.study.arms import Arm, Setting
from enact_common.study.images import TRAIN
from enact_common.study.sources import load_images
from enact_common.study.training import Results, Task, feature_map_size, prepared_model, set_training
from enact_common.training.engine import TrainStep
from enact_common.training.optimization import build_optimization
from enact_common.utils.acceleration import prepare
from enact_common.utils.device import autocast
from enact_common.variants import load_variant

# Number of warm-up and of timed training steps.
WARMUP, STEPS = 2, 5

# Standard deviation, in cells, of the blur that makes random maps as smooth as feature maps of images.
SMOOTH = 2.0

# Flags for one encoder layer of the published models.
ENCODER = "--backbone resnet18 --backbone_weights none --enc_layers 1 --dec_layers 1 --dropout 0"


def measure_step(task: Task, folder: Path, threads: int) -> dict[str, float]:
    """Return the median `seconds` of a training step, and `memory`, the bytes by which it raises the peak. Needs a
    separate process."""
    torch.set_num_threads(threads)
    device, results = torch.device(task.device), Results(folder)
    data = load_images(task.source, folder / "data")[TRAIN].to(device)
    model, criterion, _, args = prepared_model(task, data, feature_map_size(task, data), results)
    prepare(model, args, device)
    criterion.to(device)
    set_training(model, task)
    step = TrainStep(model, criterion, build_optimization(model, args, device), device)
    samples, targets = data.batch(torch.arange(args.batch_size))
    for _ in range(WARMUP):
        step(samples, targets)
    meter = MemoryMeter(device)
    runs = take_turns({"": lambda: step(samples, targets)}, STEPS, synchronizer(device), warmup=0)[""]
    return {"seconds": statistics.median(runs), "memory": meter.read()["rise"]}


def measure_encoders(
    variant: str,
    arms: tuple[Arm, ...],
    length: int,
    shape: tuple[int, int],
    batch: int,
    device_name: str,
    amp: str,
    threads: int,
    repeat: int,
) -> dict[str, dict]:
    """Time forward and backward of one encoder layer of the published width on a random smooth map.

    The arms take turns. Needs a separate process.

    Args:
        length: window length, in tokens, for arms that do not compute it.
        shape: height and width of the map.
        device_name, amp, threads: device, precision and number of CPU threads.

    Returns:
        for each arm `seconds`, a list, and `clusters`, None for an arm without clusters.
    """
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    steps: dict[str, Callable[[], None]] = {}
    clusters = {}
    for arm in arms:
        steps[arm.name] = EncoderStep(variant, arm, length, shape, batch, device, amp)
        model = steps[arm.name].model
        with counted_clusters(model) as counts:
            steps[arm.name]()
        clusters[arm.name] = counts[0] if counts else None
    times = take_turns(steps, repeat, synchronizer(device))
    return {name: {"seconds": times[name], "clusters": clusters[name]} for name in times}


class EncoderStep:
    """A callable that runs forward and backward of an encoder; arguments are those of `measure_encoders`."""

    def __init__(self, variant, arm, length, shape, batch, device, amp):
        parser = load_variant(variant).main.get_args_parser()
        own = "--no-dilation" if variant == "anchor" else ""
        args = parser.parse_args(["--coco_path", "-", *f"{ENCODER} {own}".split(), *arm.flags])
        torch.manual_seed(0)
        self.model: nn.Module = load_variant(variant).models.build_model(args)[0]
        for change in arm.changes:
            change(self.model, Setting((length,), shape))
        self.model.to(device)
        self.device, self.amp = device, amp
        d = args.hidden_dim
        self.maps, positions = (blur(torch.randn(batch, *shape, d), SMOOTH).to(device) for _ in range(2))
        mask = torch.zeros(batch, *shape, dtype=torch.bool, device=device)
        transformer = self.model.transformer
        if variant == "anchor":
            query = torch.zeros(1, d, device=device)
            with torch.no_grad():  # shared by all layers, so not a cost of one layer
                placed = transformer.embed_positions(mask, torch.zeros(1, 2, device=device), query)
            (layer,) = transformer.encoder_layers
            self.encode = lambda maps: layer(maps, placed)
        else:
            pos = positions.flatten(1, 2).transpose(0, 1)  # (N, batch, d)
            self.maps = self.maps.flatten(1, 2).transpose(0, 1).contiguous()  # (N, batch, d)
            self.encode = lambda tokens: transformer.encoder(tokens, mask.flatten(1), pos, shape)
        self.maps.requires_grad_()

    def __call__(self) -> None:
        with autocast(self.device, self.amp):
            output = self.encode(self.maps)
        output.sum().backward()
        self.model.zero_grad(set_to_none=True)
        self.maps.grad = None
