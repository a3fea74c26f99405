"""A demo that needs no data: draw shapes, train a small detector on them, evaluate it and draw its detections.

`make demo`, or `python -m enact_common.demo --output_dir demo`. It prints and runs the same commands that train on
COCO.
"""

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from enact_common.cli.program import Parser, program
from enact_common.data.annotations import load_annotations
from enact_common.data.images import decode_image
from enact_common.data.synthetic import make_shapes
from enact_common.evaluation.stored import RESULTS
from enact_common.training.run_logs import METRICS_KEY, read_epochs
from enact_common.utils.errors import UserError, exit_status
from enact_common.variants import VARIANTS

ROOT = Path(__file__).resolve().parent.parent

SHAPES = {
    "train": 6000,
    "val": 200,
    "size": 112,
    "objects": (1, 3),
    "object_size": (0.25, 0.6),
    "classes": ("circle", "square", "triangle", "star"),
    "min_visible": 1,
}

# A small detector of any variant learns in minutes on two CPU cores; docs/results/demo.md explains the flags.
TRAINING = (
    "--device cpu --backbone resnet18 --backbone_weights none --backbone_norm batch --enc_layers 2 --dec_layers 3 "
    "--dim_feedforward 512 --dropout 0 --no_augmentation --train_sizes 112 --eval_size 112 "
    "--max_size 112 --batch_size 16 --epochs 3 --lr 2e-4 --lr_backbone 1e-3 --lr_schedule cosine --warmup_steps 50 "
    "--bbox_loss_coef 1.25 --giou_loss_coef 0.5 --num_workers 0 --print_freq 50"
).split()

# Additional flags of each variant, which override `TRAINING`.
OWN = {
    "detr": "--num_queries 10 --eos_coef 0.4".split(),
    "conditional": (
        "--num_queries 10 --backbone_stages 2 --train_sizes 64 --eval_size 64 --max_size 64 --hidden_dim 128 "
        "--dim_feedforward 256 --enc_layers 1 --dec_layers 4 --lr 5e-4 --epochs 5"
    ).split(),
    "anchor": (
        "--num_query_position 20 --num_query_pattern 1 --no-dilation --lr 3e-4 --batch_size 8 --warmup_steps 100"
    ).split(),
}

# Validation images that are drawn.
PICTURED = 6
# Minimum score of drawn detections, near the best balance of misses and false positives. A focal loss gives lower
# probabilities than a softmax.
THRESHOLDS = {"detr": 0.5, "conditional": 0.4, "anchor": 0.35}


def build_parser() -> argparse.ArgumentParser:
    """Return the demo's command-line parser."""
    parser = Parser(prog=program("enact_common.demo"), description=__doc__.splitlines()[0])
    parser.add_argument(
        "--variant", choices=tuple(VARIANTS), default="conditional", help="detector (default: %(default)s)"
    )
    parser.add_argument("--output_dir", default="demo", metavar="DIR", help="output folder (default: demo)")
    parser.add_argument("flags", nargs="*", metavar="FLAG", help="after --: training flags that override the demo's")
    return parser


def run_variant(variant: str, *argv: str) -> None:
    """Print a variant's command line and run it.

    Raises:
        SystemExit: the command failed; the status is the command's.
    """
    print(f"\n$ enact train {variant} {shlex.join(argv)}\n", flush=True)
    # The package may not be installed, so the command needs its folder on the path.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "enact_common", "train", variant, *argv]
    with subprocess.Popen(command, env=environment) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            # SIGTERM, not SIGKILL: the training finishes its step and writes a checkpoint.
            process.terminate()
            raise
    if status:
        sys.exit(status)


def picture_detections(data: Path, results: Path, threshold: float, picture: Path) -> None:
    """Draw the first validation images with their annotations and the detections that reach the threshold."""
    annotations = load_annotations(data / "annotations" / "instances_val2017.json")
    truths, detections = defaultdict(list), defaultdict(list)
    for annotation in annotations["annotations"]:
        truths[annotation["image_id"]].append(annotation)
    for detection in json.loads(results.read_text()):
        if detection["score"] >= threshold:
            detections[detection["image_id"]].append(detection)
    images = annotations["images"][:PICTURED]
    from enact_common.plots.detections import plot_detections

    plot_detections(
        [decode_image(data / "val2017" / image["file_name"]).permute(1, 2, 0).numpy() for image in images],
        [truths[image["id"]] for image in images],
        [detections[image["id"]] for image in images],
        {category["id"]: category["name"] for category in annotations["categories"]},
        picture,
    )


def main(argv: list[str] | None = None) -> int:
    """Run the demo and return its exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    return exit_status(parser.prog, lambda: demonstrate(args))


def demonstrate(args: argparse.Namespace) -> int:
    """Draw shapes, train and evaluate a detector, and plot its curves and detections.

    Returns:
        0.

    Raises:
        UserError: matplotlib is not installed.
        SystemExit: training or evaluation failed; the status is the command's.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the demo needs matplotlib: pip install 'enact-detection[plots]'")
    from enact_common.plots.curves import plot_curves

    output = Path(args.output_dir)
    run = output / "run"
    try:
        data = make_shapes(output / "shapes", **SHAPES, progress=True, parallel=True)
    except FileExistsError:
        # Replace the shapes of an earlier version's demo; a folder of anything else is refused again.
        data = make_shapes(output / "shapes", **SHAPES, progress=True, parallel=True, force=True)
    # Remove the run of an earlier demo: a training refuses a folder that holds a run.
    shutil.rmtree(run, ignore_errors=True)
    # The last value of a repeated flag counts, so later flags override earlier ones.
    flags = ["--coco_path", str(data), "--output_dir", str(run), *TRAINING, *OWN[args.variant], *args.flags]
    run_variant(args.variant, *flags)
    run_variant(args.variant, *flags, "--resume", str(run / "checkpoint.pth"), "--eval")

    epochs = read_epochs(run)
    plot_curves({args.variant: epochs}, output / "curves.png")
    picture_detections(data, run / RESULTS, THRESHOLDS[args.variant], output / "detections.png")
    ap, ap50 = epochs[-1][METRICS_KEY][:2]
    print(f"\nAP {ap:.3f}, AP50 {ap50:.3f} on {SHAPES['val']} validation images")
    print(f"ground truth and detections: {output / 'detections.png'}")
    print(f"loss and AP curves:          {output / 'curves.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
