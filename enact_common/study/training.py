"""Training and evaluation of one arm, from weights that all arms share, on the same images in the same order."""

import contextlib
import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou

from enact_common.attention.clustering import clusterings
from enact_common.attention.clusters import Clusters, Windows
from enact_common.attention.hilbert import HILBERT, ROWS, hilbert_permutations
from enact_common.checkpoints.pretrained import fit_weights
from enact_common.cli.flags import with_flags
from enact_common.data.categories import LabelMap
from enact_common.evaluation.coco import METRICS, CocoBoxEvaluator
from enact_common.models.backbone import stride_of
from enact_common.models.layers import scales_logits
from enact_common.study.arms import PLAIN, Arm, Setting, attend_to_nothing, encoder_layers, zero_output_projections
from enact_common.study.features import take_features
from enact_common.study.images import TRAIN, VAL, Images, Shapes
from enact_common.study.presets import ARMS
from enact_common.study.sources import Source, keep, load_images
from enact_common.training.engine import TrainStep
from enact_common.training.optimization import Optimization, build_optimization
from enact_common.utils.acceleration import BATCH_NORMS, prepare
from enact_common.utils.device import autocast
from enact_common.utils.errors import UserError
from enact_common.variants import load_variant

# The training without encoder attention, from whose weights all arms start.
START = Arm("start", "no attention", ("--encoder_attention", "mhsa"), (attend_to_nothing,))

# Steps between two entries of the cluster trace.
TRACE_EVERY = 20

EVALUATION_BATCH = 10

# Minimum IoU at which a box covers an object.
COVERED = 0.5

# Number of evaluation batches for introspection.
INTROSPECTION_BATCHES = 10


@dataclass(frozen=True)
class Task:
    """One training.

    Attributes:
        seed: seed of the weights and of the image order.
        images: number of training images of an arm with budget 1, counting repeats.
        start_source: data set of the start training, if it differs.
        encoder_alone: whether arms train only their encoder.
        backbone_of: start training of another variant, from whose backbone this variant's start training starts; None
            for random weights.
        source, variant, flags, start_images: as in `Trial`.
    """

    source: Source
    variant: str
    flags: tuple[str, ...]
    arm: Arm
    seed: int
    images: int
    start_images: int
    device: str
    start_source: Source | None = None
    encoder_alone: bool = False
    backbone_of: "Task | None" = None

    @property
    def name(self) -> str:
        """Name in files."""
        return f"{self.source.name}-{self.variant}-{self.arm.name}-{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that the result depends on, in JSON types."""
        arm = {
            "name": self.arm.name, "flags": list(self.arm.flags), "budget": self.arm.budget,
            "rate": self.arm.rate, "begins_with": self.arm.begins_with,
            "changes": [change.__name__ for change in self.arm.changes],
        }  # fmt: skip
        backbone = self.backbone_of and self.backbone_of.settings
        sources = {"source": asdict(self.source), "start_source": self.start_source and asdict(self.start_source)}
        return json.loads(json.dumps({**vars(self), **sources, "arm": arm, "backbone_of": backbone}))

    def other(self, arm: Arm) -> "Task":
        """Return this training with another arm."""
        return replace(self, arm=arm)


@dataclass
class Results:
    """The files of finished trainings in the study's folder: a small JSON file of each, and the weights of some."""

    folder: Path

    def path(self, task: Task) -> Path:
        """Return the file of a training's result."""
        return self.folder / "results" / f"{task.name}.json"

    def weights(self, task: Task) -> Path:
        """Return the file of a training's weights, which exists only if they are kept."""
        return self.folder / "weights" / f"{task.name}.pt"

    def paused(self, task: Task) -> Path:
        """Return the file of a training's state, which exists only while it is interrupted."""
        return self.folder / "paused" / f"{task.name}.pt"

    def read(self, task: Task) -> dict[str, Any] | None:
        """Return a training's result, or None if it is missing or has other settings; refuse a damaged file."""
        path = self.path(task)
        try:
            result = json.loads(path.read_text()) if path.is_file() else {}
            return result if result.get("settings") == task.settings else None
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: not the result of a training ({error}); remove the file to repeat it") from error

    def write(self, task: Task, result: Mapping[str, Any]) -> None:
        """Write a training's result atomically."""
        content = json.dumps({"settings": task.settings, **result}, indent=1).encode()
        keep(self.path(task), lambda file: file.write(content))


def arguments(task: Task):
    """Return a variant's arguments for a training."""
    parser = load_variant(task.variant).main.get_args_parser()
    size = str(2**12)  # images already have their final size
    args = parser.parse_args(
        ["--coco_path", "-", "--max_size", size, "--device", task.device, *task.flags, *task.arm.flags]
    )
    parser.check(args)
    return with_flags(args, lr=args.lr * task.arm.rate, lr_backbone=args.lr_backbone * task.arm.rate)


def build(task: Task, classes: int, seed: int):
    """Return (model, criterion, postprocessors, arguments) with random weights from a seed."""
    args = with_flags(arguments(task), num_classes=classes)
    torch.manual_seed(seed)
    model, *others = load_variant(task.variant).models.build_model(args)
    if not isinstance(task.source, Shapes):
        take_features(model)
    return (model, *others, args)


def initial_weights(task: Task, classes: int, results: Results) -> dict[str, Tensor]:
    """Return the weights that all arms of a seed start from, as a plain model's state dict.

    If there is a start training, all weights except the encoder attention's come from it.
    """
    model, *_ = build(task.other(Arm(PLAIN, "", ("--encoder_attention", "mhsa"))), classes, task.seed)
    weights = model.state_dict()
    if task.start_images and task.arm.name != START.name:
        trained = saved_weights(start_of(task), results)
        weights |= {name: trained[name] for name in trained if name in weights}
    elif task.arm.name == START.name and task.backbone_of:
        trained = saved_weights(task.backbone_of, results)
        by_part = {name.partition("body.")[2]: tensor for name, tensor in trained.items() if "body." in name}
        weights |= {name: by_part[name.partition("body.")[2]] for name in weights if "body." in name}
    return weights


def saved_weights(task: Task, results: Results) -> dict[str, Tensor]:
    """Return the final weights of a training; if they were not kept, repeat it."""
    path = results.weights(task)
    if not path.is_file():
        train(task, results)
    return torch.load(path, weights_only=True)


def start_of(task: Task) -> Task:
    """Return the start training of a training; all seeds share that of seed 0."""
    source = task.start_source or task.source
    return replace(
        task, arm=START, seed=0, images=task.start_images, source=source, start_source=None, encoder_alone=False
    )


def prepared_model(task: Task, data: Images, map_size: tuple[int, int], results: Results):
    """Return an arm's model with its initial weights, and its criterion, postprocessors and arguments."""
    model, criterion, postprocessors, args = build(task, len(data.classes), task.seed)
    layers = encoder_layers(model)
    weights = initial_weights(task, len(data.classes), results)
    own = model.state_dict()
    if task.arm.begins_with:
        trained = saved_weights(task.other(ARMS[task.arm.begins_with]), results)
        weights = fit_weights(trained, own, args.nheads, True, scales_logits(args)).weights
    model.load_state_dict(
        {name: tensor for name, tensor in weights.items() if name in own and own[name].shape == tensor.shape},
        strict=False,
    )
    if task.start_images and task.arm.name != START.name and not task.arm.begins_with:
        zero_output_projections(model)
    lengths: tuple[int, ...] = ()
    if task.arm.lengths_of:
        lengths = tuple(results.read(task.other(ARMS[task.arm.lengths_of]))["mean_lengths"])
    if task.encoder_alone:
        model.requires_grad_(False)
        layers.requires_grad_(True)
    for change in task.arm.changes:
        change(model, Setting(lengths, map_size))
    return model, criterion, postprocessors, args


def set_training(model: nn.Module, task: Task) -> None:
    """Put a model into training mode, except batch norms if only the encoder is trained."""
    model.train()
    for module in model.modules():
        if task.encoder_alone and isinstance(module, BATCH_NORMS):
            module.eval()


class ClusterTrace:
    """A trace of the number of clusters in a detector's encoder layers during training.

    They are counted when `step` is a multiple of `TRACE_EVERY`.
    """

    def __init__(self, model: nn.Module):
        self.layers = clusterings(model)
        self.rows: list[tuple[int, list[float], list[float]]] = []
        self.step = 0
        self.handles = [layer.register_cluster_hook(self.trace) for layer in self.layers]

    def trace(self, information: Tensor, clusters: Clusters) -> None:
        """Count the clusters of a layer; each layer calls this in turn."""
        if self.step % TRACE_EVERY:
            return
        if not self.rows or self.rows[-1][0] != self.step:
            self.rows.append((self.step, [], []))
        count = clusters.shape[1]
        if clusters.padding_mask is not None:
            count = float((~clusters.padding_mask).sum(dim=1).float().mean())
        self.rows[-1][1].append(float(count))
        self.rows[-1][2].append(information.shape[1] / float(count))

    def as_json(self) -> list[dict]:
        """Return a row for each traced step: `step`, and `clusters` per image in each layer."""
        return [{"step": step, "clusters": counts} for step, counts, _ in self.rows]

    def mean_lengths(self) -> list[int]:
        """Return the mean number of tokens per cluster in each layer over the training."""
        if not self.rows or not self.layers:
            return []
        return [max(round(float(np.mean(lengths))), 1) for lengths in zip(*(row[2] for row in self.rows), strict=True)]


def train(task: Task, results: Results, until: float = math.inf) -> dict[str, Any] | None:
    """Train and evaluate an arm, write its result and return it; None for an unfinished training.

    If it starts from missing weights of another training, that one runs first. An unfinished training is saved at a
    time of `time.perf_counter`, `until`, to continue in the next call.
    """
    device = torch.device(task.device)
    parts = {name: part.to(device) for name, part in load_images(task.source, results.folder / "data").items()}
    data = parts[TRAIN]
    map_size = feature_map_size(task, data)
    model, criterion, postprocessors, args = prepared_model(task, data, map_size, results)
    prepare(model, args, device)
    criterion.to(device)
    before = look(model, parts[VAL], map_size, args.amp)
    set_training(model, task)
    trace = ClusterTrace(model)

    optimization = build_optimization(model, args, device)
    step = TrainStep(model, criterion, optimization, device)
    count = max(round(task.images * task.arm.budget) // args.batch_size, 1)
    losses = torch.zeros(count, device=device)
    progress = Progress(results.paused(task), task, model, optimization, losses, trace)
    first, before, seconds = progress.restore(before)
    begin = time.perf_counter() - seconds
    for number, indices in zip(range(count), order_of(len(data), args.batch_size, task.seed), strict=False):
        if number < first:
            continue
        if time.perf_counter() > until:
            step.check()
            progress.save(number, before, time.perf_counter() - begin)
            return None
        optimization.learning_rate(0, number, count)
        trace.step = number
        losses[number] = criterion.total(step(*data.batch(indices), where=f"step {number} of {task.name}"))
    step.check()
    losses = losses.tolist()
    seconds = time.perf_counter() - begin

    rows, lengths = trace.as_json(), trace.mean_lengths()
    for handle in trace.handles:
        handle.remove()
    result = {
        **evaluate(model, postprocessors, parts[VAL], device, args),
        "images": count * args.batch_size,
        "steps": count,
        "seconds": seconds,
        "loss": [float(np.mean(chunk)) for chunk in np.array_split(losses, min(40, count))],
        "clusters": rows,
        "mean_lengths": lengths,
        "before": before,
        "after": look(model, parts[VAL], map_size, args.amp),
        "map_size": list(map_size),
    }
    if task.arm.name in (START.name, PLAIN):
        keep(results.weights(task), lambda file: torch.save(model.state_dict(), file))
    results.write(task, result)
    progress.path.unlink(missing_ok=True)
    return result


@dataclass
class Progress:
    """The state of a training that continues in another call, in a file; `restore` changes its parts in place.

    The dropout of all presets is 0, so no random state is needed.
    """

    path: Path
    task: Task
    model: nn.Module
    optimization: Optimization
    losses: Tensor
    trace: ClusterTrace

    def save(self, number: int, before: dict, seconds: float) -> None:
        """Save the state after a number of steps; `before` and `seconds` become part of the result."""
        state = {
            "settings": json.dumps(self.task.settings), "number": number, "before": before, "seconds": seconds,
            "model": self.model.state_dict(), "optimizer": self.optimization.optimizer.state_dict(),
            "losses": self.losses, "rows": self.trace.rows,
        }  # fmt: skip
        keep(self.path, lambda file: torch.save(state, file))

    def restore(self, before: dict) -> tuple[int, dict, float]:
        """Return the steps done, the saved `before`, and the seconds they took; (0, before, 0) without saved state."""
        if not self.path.is_file():
            return 0, before, 0.0
        state = torch.load(self.path, map_location=self.losses.device, weights_only=True)
        if state["settings"] != json.dumps(self.task.settings):
            return 0, before, 0.0
        self.model.load_state_dict(state["model"])
        self.optimization.optimizer.load_state_dict(state["optimizer"])
        self.losses.copy_(state["losses"])
        self.trace.rows[:] = state["rows"]
        return state["number"], state["before"], state["seconds"]


def feature_map_size(task: Task, data: Images) -> tuple[int, int]:
    """Return height and width of the transformer's feature map."""
    # Photographs are given as feature maps.
    stride = stride_of(arguments(task)) if isinstance(task.source, Shapes) else 1
    return tuple(math.ceil(side / stride) for side in data.pixels.shape[-2:])


def order_of(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of indices int64 (batch,) without end, shuffled anew in each pass."""
    for number in itertools.count():
        order = torch.from_numpy(np.random.default_rng([seed, number]).permutation(count))
        yield from order[: count // batch * batch].split(batch)


@torch.inference_mode()
def evaluate(
    model: nn.Module, postprocessors: Mapping[str, nn.Module], data: Images, device: torch.device, args
) -> dict[str, Any]:
    """Evaluate a model on images and leave it in evaluation mode.

    Returns `figures`, the COCO metrics by name, and `right`, the fraction of objects whose best query has the right
    class, among those that a query's box covers (`COVERED`), which measures classification apart from localisation;
    None if no object is covered.
    """
    model.eval()
    ids = [i + 1 for i in range(len(data.classes))]
    evaluator = CocoBoxEvaluator(LabelMap.from_dict({"category_ids": ids, "names": data.classes}))
    right: list[bool] = []
    for indices in torch.arange(len(data)).split(EVALUATION_BATCH):
        samples, targets = data.batch(indices)
        with autocast(device, args.amp):
            outputs = model(samples)
        right += right_classes(outputs, targets, len(ids))
        evaluator.update(indices.tolist(), postprocessors["bbox"](outputs, data.original[indices].to(device)))
    stats = evaluator.evaluate(data.truth()).stats
    figures = {name: float(value) for name, value in zip(METRICS, stats, strict=True)}
    return {"figures": figures, "right": float(np.mean(right)) if right else None}


def right_classes(outputs: Mapping[str, Tensor], targets: list[dict[str, Tensor]], classes: int) -> list[bool]:
    """Return whether the best query's class is right, for each object that a query's box covers (`COVERED`).

    `outputs` have `pred_logits` (batch, Q, classes or more) and `pred_boxes` (batch, Q, 4), cxcywh as fractions of the
    image; `targets` have `labels` and `boxes` of each image's objects.
    """
    correct: list[bool] = []
    for logits, boxes, target in zip(outputs["pred_logits"], outputs["pred_boxes"], targets, strict=True):
        if len(target["labels"]) == 0:
            continue
        corners = (box_convert(part.float(), "cxcywh", "xyxy") for part in (boxes, target["boxes"]))
        overlap, query = box_iou(*corners).max(dim=0)  # (objects,)
        right = logits[query, :classes].argmax(dim=1) == target["labels"]
        correct += right[overlap >= COVERED].tolist()
    return correct


class InformationTrace:
    """A hook that keeps a clustering's information and inequality of pooling weights in each batch.

    Args:
        to_rows: int64 (N,), permutation of the tokens to row order; None if they are in row order.

    Attributes:
        information: (batch, N) of each batch, in row order, on the CPU.
        inequality: for each batch, the largest pooling weight in a window relative to equal weights, averaged over
            windows; empty if clusters are not windows.
    """

    def __init__(self, to_rows: Tensor | None):
        self.to_rows = to_rows
        self.information: list[Tensor] = []
        self.inequality: list[float] = []

    def __call__(self, information: Tensor, clusters: Clusters) -> None:
        information = information.cpu()
        self.information.append(information if self.to_rows is None else information[:, self.to_rows])
        if isinstance(clusters, Windows):
            weights = clusters.weights
            self.inequality.append(float((weights.amax(dim=-1) * weights.shape[-1]).mean()))


@contextlib.contextmanager
def information_traces(model: nn.Module, map_size: tuple[int, int]) -> Iterator[list[InformationTrace]]:
    """Attach an `InformationTrace` to each clustering of a model within the context."""
    layers = clusterings(model)
    curved = getattr(getattr(model.transformer, "encoder", None), "order", ROWS) == HILBERT
    to_rows = hilbert_permutations(*map_size, torch.device("cpu"))[1] if curved else None
    traces = [InformationTrace(to_rows) for _ in layers]
    with contextlib.ExitStack() as handles:
        for layer, trace in zip(layers, traces, strict=True):
            handles.enter_context(layer.register_cluster_hook(trace))
        yield traces


@torch.no_grad()
def look(model: nn.Module, data: Images, map_size: tuple[int, int], amp: str) -> dict[str, list[float | None]]:
    """Return how the information of the encoder layers relates to objects, on a few batches (`INTROSPECTION_BATCHES`).

    For each layer `correlation`, Pearson's r of a cell's information with being in an object's box, over an image's
    cells without padding, averaged over images; and `inequality` of `InformationTrace`, averaged over batches. None if
    undefined. The model is left in evaluation mode.
    """
    model.eval()
    cells: list[tuple[Tensor, Tensor]] = []
    with information_traces(model, map_size) as traces:
        for indices in torch.arange(len(data)).split(EVALUATION_BATCH)[:INTROSPECTION_BATCHES]:
            samples, _ = data.batch(indices)
            with autocast(samples.tensors.device, amp):
                model(samples)
            cells.append(tuple(part.flatten(1) for part in data.on_object(indices, map_size)))
    inside, padding = (torch.cat(parts) for parts in zip(*cells, strict=True))
    return {
        "correlation": [correlation(torch.cat(trace.information), inside, padding) for trace in traces],
        "inequality": [float(np.mean(trace.inequality)) if trace.inequality else None for trace in traces],
    }


def correlation(information: Tensor, inside: Tensor, padding: Tensor) -> float | None:
    """Return Pearson's r of the information (n, N) with being inside an object, averaged over images; None if
    undefined.

    `inside` and `padding` are bool (n, N).
    """
    coefficients = []
    for values, marks, skipped in zip(information.double(), inside.double(), padding, strict=True):
        r = float(torch.corrcoef(torch.stack((values[~skipped], marks[~skipped])))[0, 1])
        # r is undefined for an image without objects.
        coefficients += [r] if math.isfinite(r) else []
    return float(np.mean(coefficients)) if coefficients else None
