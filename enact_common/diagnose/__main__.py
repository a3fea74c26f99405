"""The diagnosis' command line: `python -m enact_common.diagnose RUN|CHECKPOINT --coco_path DIR --output_dir OUT`."""

import argparse
import json
import sys
from pathlib import Path

from enact_common import diagnose as package
from enact_common.cli.program import Parser, program
from enact_common.cli.types import fraction, natural_int, positive_int
from enact_common.diagnose.analysis import diagnose, hotcoco_package
from enact_common.diagnose.page import build_page, summary, tables
from enact_common.diagnose.sources import read_source
from enact_common.evaluation.stored import RESULTS, check_recorded
from enact_common.utils.device import find_device
from enact_common.utils.errors import exit_status
from enact_common.utils.files import check_no_folder, make_folder, write_file

PAGE, TABLES, RECORD = "diagnose.html", "diagnose.md", "diagnose.json"


def build_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = Parser(
        prog=program("enact_common.diagnose"),
        description=package.__doc__,
        epilog=f"The tables go to the terminal and to {TABLES}, all values to {RECORD}. {PAGE} adds pictures; it needs "
        "no other file and no network. Needs the extra diagnose (hotcoco).",
    )
    parser.add_argument(
        "source", type=Path, metavar="RUN|CHECKPOINT",
        help=f"folder of a training or of an evaluation: its {RESULTS}, else its best or latest checkpoint; or a "
        f"checkpoint; or a {RESULTS} in COCO's results format. A checkpoint is evaluated first",
    )  # fmt: skip
    parser.add_argument("--coco_path", metavar="DIR", help="folder of the data set, as for training")
    parser.add_argument("--val_images", metavar="DIR", help="folder of the images, for data not in COCO's layout")
    parser.add_argument("--val_annotations", metavar="FILE", help="COCO-format JSON of --val_images")
    parser.add_argument(
        "--remove_difficult", action="store_true", help='treat annotations with "difficult": 1 as crowds, as in --eval'
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, metavar="DIR",
        help=f"folder for {PAGE}, {TABLES} and {RECORD}, and for the detections of a checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=fraction, metavar="SCORE",
        help="minimum score for confusions, worst images and label errors, 0 to 1; AP and the kinds of errors use all "
        "detections (default: the score with the best F1)",
    )  # fmt: skip
    parser.add_argument(
        "--pictures", type=natural_int, default=8, metavar="N",
        help="maximum number of worst images, and of likely label errors, that are drawn (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--device", metavar="DEVICE", help="device to evaluate on: cuda, cuda:1, cpu (default: a GPU if available)"
    )
    parser.add_argument(
        "--batch_size", type=positive_int, default=2, metavar="N",
        help="images per forward pass of an evaluation (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--num_workers", type=natural_int, default=2, metavar="N",
        help="processes that load images for an evaluation (default: %(default)s)",
    )  # fmt: skip
    return parser


def run(args: argparse.Namespace) -> int:
    """Diagnose a run or a checkpoint; return the exit status.

    Raises:
        UserError: hotcoco is not installed, or an argument or a file is invalid.
    """
    hotcoco_package()
    for name in (PAGE, TABLES, RECORD, RESULTS):
        check_no_folder(args.output_dir / name)
    if args.device is not None:
        find_device(args.device)
    source = read_source(args)
    diagnosis = diagnose(source.truth, source.detections, args.threshold)
    check_recorded(diagnosis["metrics"]["AP"], source.record, source.file)
    make_folder(args.output_dir)

    parts = [f"# Diagnosis of {source.name}", "\n".join(f"- {text}" for text in summary(diagnosis))]
    text = "\n\n".join([*parts, *(table.markdown() for table in tables(diagnosis))])
    record = json.dumps({"source": str(args.source), "file": str(source.file), **diagnosis})
    page = build_page(source.name, diagnosis, source.images, args.pictures)
    for name, content in ((TABLES, text + "\n"), (RECORD, record + "\n"), (PAGE, page)):
        write_file(args.output_dir / name, lambda file, content=content: file.write(content.encode()))
    # Print after writing: a reader such as `head` may close the pipe early.
    print(text)
    print(f"\nwritten to {args.output_dir / PAGE}, {TABLES} and {RECORD}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the diagnosis; return the exit status: 0, or 2 for a user error."""
    parser = build_parser()
    args = parser.parse_args(argv)
    return exit_status(parser.prog, lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
