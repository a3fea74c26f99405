"""The model card of a shared detector: a README.md in Hugging Face's form, with only what the run says of itself."""

from pathlib import Path
from typing import Any

from enact_common.data.categories import LabelMap
from enact_common.evaluation.coco import EVALUATION, METRICS
from enact_common.training.logs import is_measured
from enact_common.training.run_logs import LOG, METRICS_KEY, read_epochs, read_evaluation
from enact_common.utils.errors import UserError

# Flags of a training that a card lists, if the checkpoint has them.
TRAINING_FLAGS = (
    "epochs", "batch_size", "accumulate", "lr", "lr_backbone", "lr_schedule", "lr_drop", "weight_decay",
    "clip_max_norm", "dropout", "ema", "amp", "seed", "backbone_weights", "pretrained", "train_sizes", "augmentation",
)  # fmt: skip

# Flags that name the data, the first that is given.
DATA_FLAGS = ("coco_path", "train_annotations", "val_annotations", "coco_panoptic_path")

# Most class names that a card lists.
MOST_NAMES = 30

UNKNOWN = "unknown: the checkpoint does not say"


def about_run(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint and its run's folder say about the training, in JSON types and without paths.

    Returns:
        `data`, the data set's name, None if unknown; `epoch`, the last one, from 0, None if unknown; `training`, flags
        by name; and `evaluation`, see `evaluation_of`.
    """
    saved, epoch = state["args"], state.get("epoch")
    epoch = epoch if isinstance(epoch, int) and epoch >= 0 else None
    named = next((saved[flag] for flag in DATA_FLAGS if saved.get(flag)), None)
    training = {flag: saved[flag] for flag in TRAINING_FLAGS if saved.get(flag) not in (None, "")}
    for flag in ("pretrained", "backbone_weights"):
        if flag in training:
            training[flag] = Path(str(training[flag])).name
    return {
        "data": None if named is None else Path(str(named)).name,
        "epoch": epoch,
        "training": {flag: value if isinstance(value, bool | int | float | list) else str(value)
                     for flag, value in training.items()},
        "evaluation": None if epoch is None else evaluation_of(checkpoint, epoch),
    }  # fmt: skip


def evaluation_of(checkpoint: Path, epoch: int) -> dict[str, Any] | None:
    """Return the evaluation of a checkpoint's weights, of this epoch, in its run's folder; None if none is recorded.

    Returns:
        `set`, "val", "train" or None if unknown; `images`, their number or None; `metrics`, COCO's of boxes by name, in
        [0, 1], without those that no object has.
    """
    folder = checkpoint.parent
    for read in (record_of_epoch, log_of_epoch):
        try:
            evaluation = read(folder, checkpoint, epoch)
        except UserError:  # the folder has no such file
            continue
        if evaluation:
            evaluation["metrics"] = {name: value for name, value in evaluation["metrics"].items() if is_measured(value)}
            return evaluation if evaluation["metrics"] else None
    return None


def record_of_epoch(folder: Path, checkpoint: Path, epoch: int) -> dict[str, Any] | None:
    """Return `evaluation_of` from `evaluation.json`, if it is of this checkpoint."""
    record = read_evaluation(folder / EVALUATION)
    evaluated = record.get("checkpoint")
    if record.get("epoch") != epoch or (evaluated and Path(evaluated).name != checkpoint.name):
        return None
    return {"set": record.get("set"), "images": record.get("images"), "metrics": dict(record["figures"])}


def log_of_epoch(folder: Path, checkpoint: Path, epoch: int) -> dict[str, Any] | None:
    """Return `evaluation_of` from `log.txt`."""
    row = next((row for row in read_epochs(folder / LOG) if row["epoch"] == epoch), {})
    metrics = row.get(METRICS_KEY)
    if not isinstance(metrics, list):
        return None
    return {"set": None, "images": None, "metrics": dict(zip(METRICS, metrics, strict=False))}


def card(
    title: str,
    variant: str,
    label_map: LabelMap,
    about: dict[str, Any],
    model_flags: str,
    num_queries: int,
    eval_size: int,
    license: str | None,
    name: str,
) -> str:
    """Return the card as Markdown, with the metadata that Hugging Face reads.

    Args:
        title: the model in words.
        about: from `about_run`.
        model_flags: the command-line flags that build the model, beyond the defaults.
        num_queries: the most objects of an image.
        eval_size: shorter side of an image at the model, in pixels.
        license: the weights' licence, an identifier such as "apache-2.0"; None if unknown.
        name: the folder, or the name on the hub, from which the example loads.
    """
    names = label_map.known_names()
    listed = ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "")
    epoch = about.get("epoch")
    trained = "for an unknown number of epochs" if epoch is None else f"for {epoch + 1} epoch{'s' * (epoch > 0)}"
    settings = about.get("training") or {}
    lines = [
        "---", "library_name: enact-detection", "pipeline_tag: object-detection", f"license: {license or 'unknown'}",
        f"tags: [object-detection, {variant}]", "---", "", f"# {title}", "",
        f"A detector for {len(names)} classes, trained {trained}.", "",
        "## Use", "",
        "```python", "from enact_common import EnactDetector", "",
        f'detector = EnactDetector.from_pretrained("{name}")', 'detections = detector("photo.jpg")', "```",
        "", "## Data", "",
        f"- Data set: {about.get('data') or UNKNOWN}.",
        f"- Classes: {listed}.",
        "", "## Metrics", "", *metrics_lines(about.get("evaluation")),
        "", "## Settings", "",
        f"- Model: variant {variant}, flags beyond the defaults: {f'`{model_flags}`' if model_flags else 'none'}.",
        *([f"- Training: {', '.join(f'{flag} {value}' for flag, value in settings.items())}."] if settings else
          [f"- Training: {UNKNOWN}."]),
        "", "## Licence", "",
        f"- Weights: {license or 'unknown: whoever shares them has to say'}.",
        "- Code (enact-detection): Apache-2.0.",
        "", "## Limits", "",
        f"- It has {num_queries} queries, so it finds at most {num_queries} boxes in an image, only of its classes.",
        f"- Images are resized to a shorter side of {eval_size} pixels.",
        *(["- The metrics hold for the images named above. Other images were not measured."]
          if about.get("evaluation") else ["- Its accuracy is not recorded."]),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def metrics_lines(evaluation: dict[str, Any] | None) -> list[str]:
    """Return the card's lines about metrics."""
    if not evaluation:
        return ["Unknown: no evaluation of these weights is recorded beside the checkpoint."]
    images = f"{evaluation['images']} images" if evaluation.get("images") else "the images"
    split = f"the split {evaluation['set']}" if evaluation.get("set") else "the run's evaluation"
    metrics = evaluation["metrics"]
    return [
        f"COCO's metrics of boxes, on {images} of {split}:",
        "",
        f"| {' | '.join(metrics)} |",
        f"|{'---:|' * len(metrics)}",
        f"| {' | '.join(f'{value:.3f}' for value in metrics.values())} |",
    ]
