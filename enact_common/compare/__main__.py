"""The comparison's command line: `python -m enact_common.compare RUN RUN... --output_dir DIR`."""

import argparse
import json
import sys
from pathlib import Path

from enact_common import compare
from enact_common.cli.program import Parser, program
from enact_common.cli.types import fraction, natural_int
from enact_common.compare.differences import differences_table, measure_differences
from enact_common.compare.page import build_page
from enact_common.compare.pictures import Scene, given_scenes, side_by_side, validation_scenes
from enact_common.compare.recorded import RecordedRun, read_run
from enact_common.compare.tables import classes_table, costs_table, figures_table
from enact_common.compare.terms import EQUAL, flags_table, inequalities, settings_table
from enact_common.training.run_logs import run_names
from enact_common.utils.device import find_device
from enact_common.utils.errors import UserError, exit_status
from enact_common.utils.files import check_no_folder, make_folder, write_file

PAGE, TABLES, RECORD = "compare.html", "compare.md", "compare.json"


def build_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = Parser(
        prog=program("enact_common.compare"),
        description=compare.__doc__,
        epilog=f"The tables go to the terminal and to {TABLES}, metrics and differences also to {RECORD}. {PAGE} adds "
        "curves and detections; it needs no other file and no network.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN",
        help="folder of a run, or its log.txt; differences are relative to the first run",
    )  # fmt: skip
    parser.add_argument(
        "--output_dir", type=Path, required=True, metavar="DIR", help=f"folder for {PAGE}, {TABLES} and {RECORD}"
    )
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="names of the runs, in order (default: folder names)"
    )
    parser.add_argument(
        "--images", nargs="+", type=Path, default=[], metavar="PATH",
        help="image files or folders of images to detect in (default: the first evaluation images)",
    )  # fmt: skip
    parser.add_argument(
        "--pictures", type=natural_int, default=6, metavar="N",
        help="maximum number of images, of the data set or of each --images folder; 0 for none (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=fraction, default=0.5, metavar="SCORE",
        help="minimum score of a drawn detection, 0 to 1 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--resamples", type=natural_int, default=1000, metavar="N",
        help="bootstrap resamples for the intervals of the differences in AP, which need each run's detections from "
        "--eval; 0 for no intervals (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=natural_int, default=0, metavar="N", help="seed of the resamples (default: %(default)s)"
    )
    parser.add_argument(
        "--device", metavar="DEVICE", help="device for detection: cuda, cuda:1, cpu (default: a GPU if available)"
    )
    return parser


def find_scenes(args: argparse.Namespace, runs: list[RecordedRun]) -> tuple[list[Scene], str]:
    """Return the images to detect in, and the reason if there are none."""
    scenes = given_scenes(args.images, args.pictures)
    if args.pictures == 0 and not scenes:
        return [], "--pictures is 0"
    if not any(run.checkpoint for run in runs):
        return [], "no run has a checkpoint to detect with"
    if scenes:
        return scenes, ""
    try:
        return validation_scenes(runs, args.pictures), ""
    except UserError as error:
        return [], f"{error}. Pass other images with --images."


def enumeration(names: list[str]) -> str:
    """Join names as in "A, B and C"."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def run(args: argparse.Namespace) -> int:
    """Compare the runs; return the exit status.

    Raises:
        UserError: an argument or a file of a run is invalid. Nothing has been written then.
    """
    names = run_names(args.runs, args.names)
    for file_name in (TABLES, PAGE, RECORD):
        check_no_folder(args.output_dir / file_name)
    if args.device is not None:
        find_device(args.device)
    runs = [read_run(source, name) for source, name in zip(args.runs, names, strict=True)]
    scenes, reason = find_scenes(args, runs)
    make_folder(args.output_dir)

    unequal = inequalities(runs)
    settings = [table for table in (settings_table(runs), flags_table(runs)) if table]
    figures = [figures_table(runs), costs_table(runs)]
    measured, unmeasured = measure_differences(runs, args.resamples, args.seed)
    differences = differences_table(measured, args.resamples)
    classes = classes_table(runs)
    shown = list(side_by_side(runs, scenes, args.threshold, args.device))

    title = enumeration(names)
    parts = [f"# {title}", "\n".join(f"- {text}" for text in unequal or [EQUAL])]
    parts += [table.markdown() for table in (*settings, *figures, differences, classes) if table]
    text = "\n\n".join(part for part in parts if part)
    page = build_page(
        title, runs, unequal, settings, figures, differences, unmeasured, classes, shown, reason, args.threshold
    )
    record = {
        "runs": [{"name": run.name, "metrics": run.figures} for run in runs],
        "unequal": unequal,
        "resamples": args.resamples,
        "seed": args.seed,
        "differences": [one.record() for one in measured],
        "no_differences": unmeasured or None,
    }
    for file_name, content in ((TABLES, text + "\n"), (RECORD, json.dumps(record, indent=2) + "\n"), (PAGE, page)):
        write_file(args.output_dir / file_name, lambda file, content=content: file.write(content.encode()))
    # Print after writing: a reader such as `head` may close the pipe early.
    print(text)
    if reason:
        print(f"\nno pictures: {reason}")
    if unmeasured:
        print(f"\nno intervals of the differences in AP: {unmeasured}")
    print(f"\nwritten to {args.output_dir / PAGE}, {TABLES} and {RECORD}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; return the exit status: 0, or 2 for a user error."""
    parser = build_parser()
    args = parser.parse_args(argv)
    return exit_status(parser.prog, lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
