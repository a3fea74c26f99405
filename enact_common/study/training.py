"""One arm's training: from weights that all arms share, on the same images in the same order, to COCO's figures."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from enact_common.acceleration import prepare
from enact_common.clustering import Segments, Windows
from enact_common.data.categories import LabelMap
from enact_common.device import start_counting_memory
from enact_common.engine import TrainStep, autocast
from enact_common.evaluation.coco import FIGURES, CocoBoxEvaluator
from enact_common.files import write_atomically
from enact_common.inside import clusterings
from enact_common.optimization import build_optimization
from enact_common.pretrained import fit_weights
from enact_common.study.arms import PLAIN, WINDOWS, Arm, Setting
from enact_common.study.images import TRAIN, VAL, Images, Photographs, Shapes, load_images
from enact_common.variants import load_variant

# The training without an encoder whose weights all arms begin with.
START = Arm("start", "no encoder", ("--enc_layers", "0"))

# Steps between two notes of the clusters.
NOTE_EVERY = 20

EVALUATION_BATCH = 10


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
        backbone_of: another variant's training without an encoder, whose backbone this variant's begins with; None for
            random weights.
    """

    source: Shapes | Photographs
    variant: str
    flags: tuple[str, ...]
    arm: Arm
    seed: int
    images: int
    start_images: int
    device: str
    backbone_of: "Task | None" = None

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.source.name}-{self.variant}-{self.arm.name}-{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """What its result depends on, as JSON holds it."""
        arm = {
            "name": self.arm.name, "flags": list(self.arm.flags), "budget": self.arm.budget, "after": self.arm.after,
            "changes": [change.__name__ for change in self.arm.changes],
        }  # fmt: skip
        before = self.backbone_of and self.backbone_of.settings
        own = asdict(replace(self, backbone_of=None))
        return json.loads(json.dumps({**own, "arm": arm, "backbone_of": before}))

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
        """A training's result; None where it is not done, or was done with other settings."""
        path = self.path(task)
        result = json.loads(path.read_text()) if path.is_file() else None
        return result if result and result["settings"] == task.settings else None

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
    return args


def build(task: Task, classes: int, seed: int):
    """(model, criterion, postprocessors) and their arguments, with random weights of a seed."""
    args = arguments(task)
    args.num_classes = classes
    torch.manual_seed(seed)
    return (*load_variant(task.variant).models.build_model(args), args)


def initial_weights(task: Task, classes: int, results: Results) -> dict[str, Tensor]:
    """The weights that all arms of a seed begin with, as a plain model has them.

    Where there is a training without an encoder to begin with, all but the encoder is its.
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
    return replace(task, arm=START, seed=0, images=task.start_images)


def prepared_model(task: Task, data: Images, map_size: tuple[int, int], results: Results, arms: Mapping[str, Arm]):
    """The model of an arm with the weights that it begins with, its criterion, post-processing and arguments."""
    model, criterion, postprocessors, args = build(task, len(data.classes), task.seed)
    weights = initial_weights(task, len(data.classes), results)
    own = model.state_dict()
    if task.arm.converted:
        trained = saved_weights(task.other(arms[task.arm.after]), results)
        weights = fit_weights(trained, own, args.nheads, same_labels=True).weights
    model.load_state_dict(
        {name: tensor for name, tensor in weights.items() if name in own and own[name].shape == tensor.shape},
        strict=False,
    )
    lengths: tuple[int, ...] = ()
    if task.arm.after == WINDOWS:
        lengths = tuple(results.read(task.other(arms[WINDOWS]))["mean_lengths"])
    for change in task.arm.changes:
        change(model, Setting(lengths, map_size))
    return model, criterion, postprocessors, args


class ClusterNotes:
    """Notes how many clusters a model's encoder layers make, while it trains.

    Args:
        model: a detector; its clusterings are looked at where `step` is a multiple of `NOTE_EVERY`.
    """

    def __init__(self, model: nn.Module):
        self.layers = clusterings(model)
        self.rows: list[tuple[int, list[float], list[float]]] = []
        self.step = 0
        for layer in self.layers:
            layer.observer = self.note

    def note(self, information: Tensor, clusters: Windows | Segments) -> None:
        """Called by each layer in turn."""
        if self.step % NOTE_EVERY:
            return
        if not self.rows or self.rows[-1][0] != self.step:
            self.rows.append((self.step, [], []))
        count = clusters.weights.shape[1] if isinstance(clusters, Windows) else clusters.shape[1]
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
    from enact_common.study.presets import ARMS

    device = torch.device(task.device)
    parts = {name: part.to(device) for name, part in load_images(task.source, results.folder / "data").items()}
    data = parts[TRAIN]
    map_size = feature_map_size(task, data)
    model, criterion, postprocessors, args = prepared_model(task, data, map_size, results, ARMS)
    prepare(model, args, device)
    criterion.to(device)
    model.train()
    before = look(model, parts[VAL], map_size, args) if task.arm.name != START.name else {}
    notes = ClusterNotes(model)

    optimization = build_optimization(model, args, device)
    step = TrainStep(model, criterion, optimization, device)
    count = max(round(task.images * task.arm.budget) // args.batch_size, 1)
    losses = torch.zeros(count, device=device)
    start_counting_memory(device)
    begin = time.perf_counter()
    for number, indices in zip(range(count), order_of(len(data), args.batch_size, task.seed), strict=False):
        optimization.learning_rate(0, number, count)
        notes.step = number
        losses[number] = criterion.total(step(*data.batch(indices), where=f"step {number} of {task.name}"))
    step.check()
    losses = losses.tolist()
    seconds = time.perf_counter() - begin

    rows, lengths = notes.as_json(), notes.mean_lengths()
    for layer in notes.layers:
        layer.observer = None
    evaluation = evaluate(model, postprocessors, parts[VAL], device, args)
    result = {
        "figures": {name: float(value) for name, value in zip(FIGURES, evaluation.stats, strict=True)},
        "images": count * args.batch_size,
        "steps": count,
        "seconds": seconds,
        "loss": [float(np.mean(chunk)) for chunk in np.array_split(losses, min(40, count))],
        "clusters": rows,
        "mean_lengths": lengths,
        "before": before,
        "after": look(model, parts[VAL], map_size, args) if before else {},
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
    from enact_common.backbone import stride_of

    stride = stride_of(arguments(task))
    return tuple(math.ceil(side / stride) for side in data.pixels.shape[-2:])


def order_of(count: int, batch: int, seed: int):
    """Batches of indices int64 (batch,), pass after pass, each in an order of its own."""
    number = 0
    while True:
        generator = np.random.default_rng([seed, number])
        order = torch.from_numpy(generator.permutation(count))
        yield from order[: count // batch * batch].split(batch)
        number += 1


@torch.inference_mode()
def evaluate(model: nn.Module, postprocessors: Mapping[str, nn.Module], data: Images, device: torch.device, args):
    """pycocotools' evaluation of a model on some images."""
    was_training = model.training
    model.eval()
    ids = [i + 1 for i in range(len(data.classes))]
    evaluator = CocoBoxEvaluator(LabelMap.from_dict({"category_ids": ids, "names": data.classes}))
    for indices in data.batches(EVALUATION_BATCH):
        samples, _ = data.batch(indices)
        with autocast(device, args.amp):
            outputs = model(samples)
        evaluator.update(indices.tolist(), postprocessors["bbox"](outputs, data.original[indices].to(device)))
    model.train(was_training)
    return evaluator.evaluate(data.truth())


@torch.no_grad()
def look(model: nn.Module, data: Images, map_size: tuple[int, int], args) -> dict[str, list[float]]:
    """What the encoder's layers take for informative, on some images.

    Returns:
        by layer: `correlation`, of a cell's information with being in an object's box, Pearson's r over the cells of
        an image that are not padding, the mean over images; `inequality`, the largest share in a window over what
        each token has in an average, the mean over windows: 1 where all are alike. Both empty without windows that
        follow the information.
    """
    layers = clusterings(model)
    found: list[list[tuple[Tensor, float]]] = [[] for _ in layers]

    def observer_of(place: int):
        def note(information: Tensor, clusters: Windows | Segments) -> None:
            inequality = math.nan
            if isinstance(clusters, Windows):
                inequality = float((clusters.weights.amax(dim=-1) * clusters.weights.shape[-1]).mean())
            found[place].append((information.cpu(), inequality))

        return note

    kept = [layer.observer for layer in layers]
    for place, layer in enumerate(layers):
        layer.observer = observer_of(place)
    was_training = model.training
    model.eval()
    inside, padding = [], []
    for indices in list(data.batches(EVALUATION_BATCH))[:10]:
        samples, _ = data.batch(indices)
        with autocast(samples.tensors.device, args.amp):
            model(samples)
        cells, mask = data.on_object(indices, map_size)
        inside.append(cells.flatten(1))
        padding.append(mask.flatten(1))
    model.train(was_training)
    for layer, observer in zip(layers, kept, strict=True):
        layer.observer = observer
    if not layers or not inside:
        return {}
    order = getattr(model.transformer.encoder, "order", None) if hasattr(model.transformer, "encoder") else None
    correlations, inequalities = [], []
    for rows in found:
        values = []
        for (information, _), cells, mask in zip(rows, inside, padding, strict=True):
            if order is not None:
                information = information[:, order.cpu().argsort()]
            for i in range(len(cells)):
                own = ~mask[i]
                pair = torch.stack((information[i][own].double(), cells[i][own].double()))
                r = float(torch.corrcoef(pair)[0, 1])
                if math.isfinite(r):
                    values.append(r)
        correlations.append(float(np.mean(values)) if values else math.nan)
        inequalities.append(float(np.mean([inequality for _, inequality in rows])))
    result = {"correlation": correlations, "inequality": inequalities}
    return {name: [None if math.isnan(v) else v for v in values] for name, values in result.items()}
