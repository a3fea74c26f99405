"""The detections to diagnose, with their ground truth: stored by a run, or of a checkpoint evaluated first."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from enact_common.checkpoints.bundled import bundled_file
from enact_common.checkpoints.files import BEST, LATEST
from enact_common.checkpoints.huggingface import CONFIG
from enact_common.cli.flags import COCO, with_flags
from enact_common.data.annotations import check_file_names
from enact_common.data.build import build_dataset, data_files
from enact_common.data.loading import make_loader
from enact_common.evaluation.coco import EVALUATION, CocoBoxEvaluator, evaluation_record
from enact_common.evaluation.stored import RESULTS, is_outdated, read_results, read_truth
from enact_common.inference.detector import load_detector
from enact_common.training.engine import evaluate
from enact_common.training.run_logs import LOG, read_evaluation
from enact_common.utils.errors import UserError
from enact_common.utils.files import make_folder, write_file


@dataclass
class Source:
    """Detections and the ground truth that they are compared with.

    Attributes:
        detections: float64 (n, 7), from `read_results`.
        truth: from `read_truth`.
        file: file of the detections.
        record: the evaluation record next to them; None for none.
    """

    name: str
    detections: np.ndarray
    truth: dict[str, Any]
    images: Path
    file: Path
    record: dict[str, Any] | None


def read_source(args: argparse.Namespace) -> Source:
    """Read the detections that a command line names; evaluates a checkpoint and writes its detections first.

    Raises:
        UserError: the source is none of the three kinds, or its data cannot be read. Nothing has been written then.
    """
    path, results, checkpoint = args.source, None, None
    if not path.exists() and bundled_file(path) is None:
        raise UserError(f"{path}: no such file or folder; pass a run's folder, a checkpoint, or a {RESULTS}")
    record = read_evaluation(path) if path.is_dir() and (path / EVALUATION).is_file() else None
    if path.is_dir():
        results, checkpoint = in_folder(path, record)
    elif path.suffix == ".json":
        results = path
    else:
        checkpoint = path
    split = (record or {}).get("set") if results else "val"
    if split == "test":
        raise UserError(f"{path}: was evaluated on test images, which have no annotations to compare with")
    folder, annotations = evaluation_files(args, split or "val")
    if checkpoint is not None:
        results, record = evaluate_checkpoint(checkpoint, args), None
    truth = read_truth(annotations, (record or {}).get("images"), args.remove_difficult)
    check_file_names(truth["images"], folder, annotations)
    name = path.resolve().name if path.name != RESULTS else path.resolve().parent.name
    return Source(name, read_results(results, truth), truth, folder, results, record)


def in_folder(folder: Path, record: dict[str, Any] | None) -> tuple[Path | None, Path | None]:
    """Return the detections in a folder, whose latest evaluation is `record`, or else the checkpoint to evaluate."""
    results = folder / RESULTS
    checkpoint = next((folder / name for name in (BEST, LATEST) if (folder / name).is_file()), None)
    if results.is_file() and not (is_outdated(record) and checkpoint is not None):
        return results, None
    if checkpoint is not None:
        return None, checkpoint
    if (folder / CONFIG).is_file():
        # The layout of Hugging Face: `load_checkpoint` takes the folder.
        return None, folder
    if record is not None or (folder / LOG).is_file():
        raise UserError(
            f"{folder}: a run without an evaluation to diagnose: it has neither detections ({RESULTS}, from --eval) "
            f"nor a checkpoint ({BEST} or {LATEST}); pass a checkpoint, or evaluate one with enact eval --resume CKPT "
            f"--output_dir {folder}"
        )
    raise UserError(f"{folder}: not the folder of a run; expected {RESULTS}, {BEST} or {LATEST} in it")


def evaluation_files(args: argparse.Namespace, split: str) -> tuple[Path, Path]:
    """Return the image folder and the annotation file to compare with."""
    if not (args.coco_path or args.val_images):
        raise UserError("the annotations are missing: pass --coco_path DIR, or --val_images and --val_annotations")
    if bool(args.val_images) != bool(args.val_annotations):
        raise UserError("--val_images and --val_annotations belong together; pass both, or --coco_path alone")
    flags = {f"{split}_images": args.val_images, f"{split}_annotations": args.val_annotations}
    return data_files(SimpleNamespace(dataset_file=COCO, coco_path=args.coco_path, **flags), split)


def evaluate_checkpoint(checkpoint: Path, args: argparse.Namespace) -> Path:
    """Evaluate a checkpoint on the validation images as `--eval` does; return the file of the detections.

    This file and `evaluation.json` are written to `--output_dir`.
    """
    detector = load_detector(checkpoint, args.device, threshold=0.0)
    if detector.things is not None:
        raise UserError(f"{checkpoint}: a panoptic checkpoint; the diagnosis compares boxes, so pass a box detector")
    flags = ("coco_path", "val_images", "val_annotations", "remove_difficult", "batch_size", "num_workers")
    settings = with_flags(detector.args, **{flag: getattr(args, flag) for flag in flags})
    dataset = build_dataset("val", settings, detector.label_map)
    loader = make_loader(dataset, settings, detector.device, train=False)
    print(f"evaluating {checkpoint} on {len(dataset)} images")
    evaluator, postprocessors = CocoBoxEvaluator(detector.label_map), {"bbox": detector.postprocess}
    evaluate(detector.model, None, postprocessors, loader, evaluator, detector.device, "none", len(loader))
    record = evaluation_record(evaluator.evaluate(dataset.coco_api()))
    content = json.dumps({"set": "val", "epoch": None, "checkpoint": str(checkpoint), **record})
    make_folder(args.output_dir)
    evaluator.write_results(args.output_dir / RESULTS)
    write_file(args.output_dir / EVALUATION, lambda file: file.write(content.encode()))
    return args.output_dir / RESULTS
