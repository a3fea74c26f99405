"""One arm's training: from weights that all arms share, on the same images in the same order, to COCO's figures."""

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
from enact_common.study.arms import PLAIN, Arm, Setting, attend_to_nothing, begin_silently, encoder_layers
from enact_common.study.images import TRAIN, VAL, Images, Photographs, Shapes, load_images
from enact_common.study.presets import ARMS
from enact_common.training.engine import TrainStep
from enact_common.training.optimization import build_optimization
from enact_common.utils.acceleration import BATCH_NORMS, prepare
from enact_common.utils.device import autocast
from enact_common.utils.errors import UserError
from enact_common.utils.files import write_atomically
from enact_common.variants import load_variant

# The training without attention in the encoder, whose weights all arms begin with.
START = Arm("start", "no attention", ("--encoder_attention", "mhsa"), (attend_to_nothing,))

# Steps between two notes of the clusters.
NOTE_EVERY = 20

EVALUATION_BATCH = 10

# IoU from which a box covers an object.
COVERED = 0.5

# Batches of that size whose information is looked at.
LOOKED_AT = 10


@dataclass(frozen=True)
class Task:
    """One training.

    Attributes:
        source: the data set.
        variant: a key of `VARIANTS`.
        flags: of the variant's command line, for all arms.
        arm: what is tried.
        seed: of the weights and of the images' order.
        images: that an arm of budget 1 is trained on, one counted as often as it is seen.
        start_images: those of the training that all begin with; 0 for random weights.
        device: a device's name.
        start_source: that training's data set, where it is another one.
        encoder_alone: arms train their encoder, and leave the rest as it is.
        backbone_of: another variant's such training, whose backbone this variant's begins with; None for random
            weights.
    """

    source: Shapes | Photographs
    variant: str
    flags: tuple[str, ...]
    arm: Arm
    seed: int
    images: int
    start_images: int
    device: str
    start_source: Shapes | Photographs | None = None
    encoder_alone: bool = False
    backbone_of: "Task | None" = None

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.source.name}-{self.variant}-{self.arm.name}-{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """What its result depends on, as JSON holds it."""
        arm = {
            "name": self.arm.name, "flags": list(self.arm.flags), "budget": self.arm.budget,
            "rate": self.arm.rate, "begins_with": self.arm.begins_with,
            "changes": [change.__name__ for change in self.arm.changes],
        }  # fmt: skip
        before = self.backbone_of and self.backbone_of.settings
        seen = {"source": asdict(self.source), "start_source": self.start_source and asdict(self.start_source)}
        return json.loads(json.dumps({**vars(self), **seen, "arm": arm, "backbone_of": before}))

    def other(self, arm: Arm) -> "Task":
        """The same with another arm."""
        return replace(self, arm=arm)


class Results:
    """What is done: a small JSON file of each training, and the weights that others begin with.

    Args:
        folder: of the study.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, task: Task) -> Path:
        """The result's file."""
        return self.folder / "results" / f"{task.name}.json"

    def weights(self, task: Task) -> Path:
        """The file of the weights, where they are kept."""
        return self.folder / "weights" / f"{task.name}.pt"

    def read(self, task: Task) -> dict[str, Any] | None:
        """A training's result; None where it is not done, or was done with other settings.

        Raises:
            UserError: the file is broken.
        """
        path = self.path(task)
        try:
            result = json.loads(path.read_text()) if path.is_file() else {}
            return result if result.get("settings") == task.settings else None
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: is no result of a training ({error}); remove it, and it is done again") from error

    def write(self, task: Task, result: Mapping[str, Any]) -> None:
        """Write a training's result, whole or not at all."""
        path = self.path(task)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"settings": task.settings, **result}, indent=1).encode()
        write_atomically(path, lambda file: file.write(content), sync=False)


def arguments(task: Task):
    """A variant's arguments for a training."""
    parser = load_variant(task.variant).main.get_args_parser()
    size = str(2**12)  # images come at their sizes
    args = parser.parse_args(
        ["--coco_path", "-", "--max_size", size, "--device", task.device, *task.flags, *task.arm.flags]
    )
    parser.check(args)
    return with_flags(args, lr=args.lr * task.arm.rate, lr_backbone=args.lr_backbone * task.arm.rate)


def build(task: Task, classes: int, seed: int):
    """(model, criterion, postprocessors) and their arguments, with random weights of a seed."""
    args = with_flags(arguments(task), num_classes=classes)
    torch.manual_seed(seed)
    return (*load_variant(task.variant).models.build_model(args), args)


def initial_weights(task: Task, classes: int, results: Results) -> dict[str, Tensor]:
    """The weights that all arms of a seed begin with, as a plain model has them.

    Where there is a training without attention to begin with, all but the encoder's attention is its.
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
    """The weights that a training ended with; where they are not kept, it is done again."""
    path = results.weights(task)
    if not path.is_file():
        train(task, results)
    return torch.load(path, weights_only=True)


def start_of(task: Task) -> Task:
    """The training that a training begins with: of seed 0 for all seeds."""
    source = task.start_source or task.source
    return replace(
        task, arm=START, seed=0, images=task.start_images, source=source, start_source=None, encoder_alone=False
    )


def prepared_model(task: Task, data: Images, map_size: tuple[int, int], results: Results):
    """The model of an arm with the weights that it begins with, its criterion, post-processing and arguments."""
    model, criterion, postprocessors, args = build(task, len(data.classes), task.seed)
    layers = encoder_layers(model)
    weights = initial_weights(task, len(data.classes), results)
    own = model.state_dict()
    if task.arm.begins_with:
        trained = saved_weights(task.other(ARMS[task.arm.begins_with]), results)
        weights = fit_weights(trained, own, args.nheads, same_labels=True).weights
    model.load_state_dict(
        {name: tensor for name, tensor in weights.items() if name in own and own[name].shape == tensor.shape},
        strict=False,
    )
    if task.start_images and task.arm.name != START.name and not task.arm.begins_with:
        begin_silently(model)
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
    """Put a model into training mode, but batch norms that are left as they are."""
    model.train()
    for module in model.modules():
        if task.encoder_alone and isinstance(module, BATCH_NORMS):
            module.eval()


class ClusterNotes:
    """Notes how many clusters a model's encoder layers make, while it trains.

    Args:
        model: a detector; its clusterings are looked at where `step` is a multiple of `NOTE_EVERY`.
    """

    def __init__(self, model: nn.Module):
        self.layers = clusterings(model)
        self.rows: list[tuple[int, list[float], list[float]]] = []
        self.step = 0
        self.handles = [layer.register_cluster_hook(self.note) for layer in self.layers]

    def note(self, information: Tensor, clusters: Clusters) -> None:
        """Called by each layer in turn."""
        if self.step % NOTE_EVERY:
            return
        if not self.rows or self.rows[-1][0] != self.step:
            self.rows.append((self.step, [], []))
        count = clusters.shape[1]
        if clusters.padding_mask is not None:
            count = float((~clusters.padding_mask).sum(dim=1).float().mean())
        self.rows[-1][1].append(float(count))
        self.rows[-1][2].append(information.shape[1] / float(count))

    def as_json(self) -> list[dict]:
        """A row for each step that was looked at: `step`, and `clusters` an image in each layer."""
        return [{"step": step, "clusters": counts} for step, counts, _ in self.rows]

    def mean_lengths(self) -> list[int]:
        """Tokens a cluster in each layer, in the mean over the training."""
        if not self.rows or not self.layers:
            return []
        return [max(round(float(np.mean(lengths))), 1) for lengths in zip(*(row[2] for row in self.rows), strict=True)]


def train(task: Task, results: Results) -> dict[str, Any]:
    """Train an arm and evaluate it; its result is written and returned.

    Where it begins with the weights of another training that is not there, that one comes first.
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
    notes = ClusterNotes(model)

    optimization = build_optimization(model, args, device)
    step = TrainStep(model, criterion, optimization, device)
    count = max(round(task.images * task.arm.budget) // args.batch_size, 1)
    losses = torch.zeros(count, device=device)
    begin = time.perf_counter()
    for number, indices in zip(range(count), order_of(len(data), args.batch_size, task.seed), strict=False):
        optimization.learning_rate(0, number, count)
        notes.step = number
        losses[number] = criterion.total(step(*data.batch(indices), where=f"step {number} of {task.name}"))
    step.check()
    losses = losses.tolist()
    seconds = time.perf_counter() - begin

    rows, lengths = notes.as_json(), notes.mean_lengths()
    for handle in notes.handles:
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
        path = results.weights(task)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: torch.save(model.state_dict(), file), sync=False)
    results.write(task, result)
    return result


def feature_map_size(task: Task, data: Images) -> tuple[int, int]:
    """Height and width of the feature map that the transformer gets."""
    stride = stride_of(arguments(task))
    return tuple(math.ceil(side / stride) for side in data.pixels.shape[-2:])


def order_of(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches of indices int64 (batch,), pass after pass, each in an order of its own, without end."""
    number = 0
    while True:
        generator = np.random.default_rng([seed, number])
        order = torch.from_numpy(generator.permutation(count))
        yield from order[: count // batch * batch].split(batch)
        number += 1


@torch.inference_mode()
def evaluate(
    model: nn.Module, postprocessors: Mapping[str, nn.Module], data: Images, device: torch.device, args
) -> dict[str, Any]:
    """Evaluate a model on some images; it is left in evaluation mode.

    Returns:
        `figures`, pycocotools' by name; `right`, of the objects that some query's box covers (an IoU of 0.5 or more),
        the fraction of which the best such query says the right class: what a detector knows of classes, whatever it
        knows of boxes. None where none is covered.
    """
    model.eval()
    ids = [i + 1 for i in range(len(data.classes))]
    evaluator = CocoBoxEvaluator(LabelMap.from_dict({"category_ids": ids, "names": data.classes}))
    right: list[bool] = []
    for indices in data.batches(EVALUATION_BATCH):
        samples, targets = data.batch(indices)
        with autocast(device, args.amp):
            outputs = model(samples)
        right += right_classes(outputs, targets, len(ids))
        evaluator.update(indices.tolist(), postprocessors["bbox"](outputs, data.original[indices].to(device)))
    stats = evaluator.evaluate(data.truth()).stats
    figures = {name: float(value) for name, value in zip(METRICS, stats, strict=True)}
    return {"figures": figures, "right": float(np.mean(right)) if right else None}


def right_classes(outputs: Mapping[str, Tensor], targets: list[dict[str, Tensor]], classes: int) -> list[bool]:
    """Of each object that a query's box covers with an IoU of 0.5 or more, whether the best such query's class is
    right.

    Args:
        outputs: `pred_logits` (batch, Q, classes or more), `pred_boxes` (batch, Q, 4), centre x, centre y, width,
            height as fractions of the image.
        targets: `labels` and `boxes` of each image's objects.
        classes: how many there are.
    """
    found: list[bool] = []
    for logits, boxes, target in zip(outputs["pred_logits"], outputs["pred_boxes"], targets, strict=True):
        if len(target["labels"]) == 0:
            continue
        corners = (box_convert(part.float(), "cxcywh", "xyxy") for part in (boxes, target["boxes"]))
        overlap, query = box_iou(*corners).max(dim=0)  # (objects,)
        right = logits[query, :classes].argmax(dim=1) == target["labels"]
        found += right[overlap >= COVERED].tolist()
    return found


class Watch:
    """Keeps what a clustering finds in each batch.

    Args:
        back: int64 (N,), what puts the tokens row by row; None where they come so.

    Attributes:
        information: (batch, N) of each batch, row by row, on the CPU.
        inequality: of each batch, the largest share in a window over what each token has in an average, the mean over
            the windows; empty where clusters are no windows.
    """

    def __init__(self, back: Tensor | None):
        self.back = back
        self.information: list[Tensor] = []
        self.inequality: list[float] = []

    def __call__(self, information: Tensor, clusters: Clusters) -> None:
        information = information.cpu()
        self.information.append(information if self.back is None else information[:, self.back])
        if isinstance(clusters, Windows):
            weights = clusters.weights
            self.inequality.append(float((weights.amax(dim=-1) * weights.shape[-1]).mean()))


@contextlib.contextmanager
def watched(model: nn.Module, map_size: tuple[int, int]) -> Iterator[list[Watch]]:
    """Within it, each clustering of a model has a `Watch`."""
    layers = clusterings(model)
    curved = getattr(getattr(model.transformer, "encoder", None), "order", ROWS) == HILBERT
    back = hilbert_permutations(*map_size, torch.device("cpu"))[1] if curved else None
    watches = [Watch(back) for _ in layers]
    with contextlib.ExitStack() as handles:
        for layer, watch in zip(layers, watches, strict=True):
            handles.enter_context(layer.register_cluster_hook(watch))
        yield watches


@torch.no_grad()
def look(model: nn.Module, data: Images, map_size: tuple[int, int], amp: str) -> dict[str, list[float | None]]:
    """What the encoder's layers take for informative, on some images. The model is left in evaluation mode.

    Args:
        model: a detector.
        data: the first `LOOKED_AT` batches are looked at.
        map_size: height and width of the feature map.
        amp: a key of `AMP_DTYPE`.

    Returns:
        by layer: `correlation`, of a cell's information with being in an object's box, Pearson's r over the cells of
        an image that are not padding, the mean over images; `inequality`, the mean over batches of `Watch`'s. None
        where there is none.
    """
    model.eval()
    cells: list[tuple[Tensor, Tensor]] = []
    with watched(model, map_size) as watches:
        for indices in itertools.islice(data.batches(EVALUATION_BATCH), LOOKED_AT):
            samples, _ = data.batch(indices)
            with autocast(samples.tensors.device, amp):
                model(samples)
            cells.append(tuple(part.flatten(1) for part in data.on_object(indices, map_size)))
    inside, padding = (torch.cat(parts) for parts in zip(*cells, strict=True))
    return {
        "correlation": [correlation(torch.cat(watch.information), inside, padding) for watch in watches],
        "inequality": [float(np.mean(watch.inequality)) if watch.inequality else None for watch in watches],
    }


def correlation(information: Tensor, inside: Tensor, padding: Tensor) -> float | None:
    """Pearson's r of the information with being inside an object, the mean over images; None where it has none.

    Args:
        information: (n, N).
        inside, padding: bool (n, N).
    """
    found = []
    for values, marks, skipped in zip(information.double(), inside.double(), padding, strict=True):
        r = float(torch.corrcoef(torch.stack((values[~skipped], marks[~skipped])))[0, 1])
        # An image without objects has none.
        found += [r] if math.isfinite(r) else []
    return float(np.mean(found)) if found else None
