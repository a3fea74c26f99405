"""Report the contents and faults of a data set.

    python -m enact_common.data.checks DATA

reads the annotations, lists the folders, decodes every image (unless `--quick` is given), and prints a report. Loading
a data set stops at the first fault; the report lists every kind of fault with its count and its first cases. Training
starts with `rules.quick_checks`, the part of the checks that takes only seconds.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from enact_common.cli.program import Parser, program
from enact_common.cli.types import positive_int
from enact_common.data.annotations import find_split
from enact_common.data.checks.findings import ERROR, FAULT
from enact_common.data.checks.report import contents_text, findings_text, verdict_text
from enact_common.data.checks.rules import check_fully, check_quickly
from enact_common.data.checks.split import Split
from enact_common.utils.errors import UserError, exit_status


def build_parser() -> argparse.ArgumentParser:
    """Build the argument parser."""
    parser = Parser(
        prog=program("enact_common.data.checks"),
        description=" ".join(__doc__.split("\n")[0].split()),
        epilog="Exit status: 0, no faults or errors; 1, faults or errors; 2, the data set cannot be read.",
    )
    parser.add_argument(
        "data", nargs="?", metavar="DATA",
        help="folder in COCO's layout, train2017/, val2017/ (or under images/) and "
        "annotations/instances_{train,val}2017.json; or a Roboflow export, train/ and valid/ (or val/), each with "
        "_annotations.coco.json next to the images",
    )  # fmt: skip
    for split in ("train", "val"):
        parser.add_argument(f"--{split}_images", metavar="DIR", help=f"folder of {split} images, overrides DATA")
        parser.add_argument(f"--{split}_annotations", metavar="FILE", help=f"{split} annotations, overrides DATA")
    parser.add_argument(
        "--num_queries", type=positive_int, default=100, metavar="N",
        help="queries of the model to train; report images with more objects (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true",
        help="do not read the image files: skips unreadable files, wrong sizes, EXIF orientations and equal pixels",
    )  # fmt: skip
    return parser


def find_splits(args: argparse.Namespace) -> dict[str, tuple[Path, Path]]:
    """The image folder and annotation file of each split on the command line."""
    splits = {}
    for name in ("train", "val"):
        images, annotations = getattr(args, f"{name}_images"), getattr(args, f"{name}_annotations")
        if bool(images) != bool(annotations):
            raise UserError(f"--{name}_images and --{name}_annotations go together")
        if images:
            splits[name] = Path(images), Path(annotations)
        elif args.data:
            try:
                splits[name] = find_split(args.data, name)
            except UserError as error:
                raise UserError(str(error).removeprefix("--coco_path ")) from error
    if not splits:
        raise UserError(
            "no data: pass a folder in COCO's or Roboflow's layout, or --train_images and --train_annotations"
        )
    return splits


def main(argv: Sequence[str] | None = None) -> int:
    """Check a data set and print the report; return 0, 1 with faults or errors, or 2 if it cannot be read."""
    parser = build_parser()
    args = parser.parse_args(argv)
    return exit_status(parser.prog, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """`main` after parsing, without the handling of errors."""
    splits = [Split(name, *paths) for name, paths in find_splits(args).items()]
    if args.quick:
        findings = check_quickly(splits, args.num_queries)
    else:
        findings = check_fully(splits, args.num_queries, progress=True)
    for split in splits:
        print(f"{split.name:<6} {split.file}, images in {split.folder}")
    print(f"\n{contents_text(splits)}\n")
    if findings:
        print(f"{findings_text(findings)}\n")
    print(verdict_text(findings) + ("; the image files were not read (--quick)" if args.quick else ""))
    return int(any(finding.severity in (ERROR, FAULT) for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
