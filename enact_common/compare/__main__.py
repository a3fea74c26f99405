"""The comparison's command line: `python -m enact_common.compare RUN RUN... --output_dir DIR`."""

import argparse
import sys
from pathlib import Path

from enact_common import compare
from enact_common.cli.program import program
from enact_common.cli.types import fraction, natural_int
from enact_common.compare.page import build_page
from enact_common.compare.pictures import Scene, given_scenes, side_by_side, validation_scenes
from enact_common.compare.recorded import RecordedRun, read_run
from enact_common.compare.tables import classes_table, costs_table, figures_table
from enact_common.compare.terms import EQUAL, flags_table, inequalities, settings_table
from enact_common.training.run_logs import run_names
from enact_common.utils.device import find_device
from enact_common.utils.errors import UserError, exit_status
from enact_common.utils.files import check_no_folder, make_folder, write_file

PAGE, TABLES = "compare.html", "compare.md"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program("enact_common.compare"),
        description=compare.__doc__,
        epilog=f"The tables go to the terminal and to {TABLES}; {PAGE} has them too, with curves and detections, and "
        "can be sent to others: it needs no other file and no network.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN",
        help="a run's folder, or a log.txt alone; differences are to the first",
    )  # fmt: skip
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help=f"for {PAGE} and {TABLES}")
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="what to call the runs, in order (default: their folders' names)"
    )
    parser.add_argument(
        "--images", nargs="+", type=Path, default=[], metavar="PATH",
        help="image files, or folders of them, to detect in (default: the first that the runs were evaluated on)",
    )  # fmt: skip
    parser.add_argument(
        "--pictures", type=natural_int, default=6, metavar="N",
        help="images at most of the data set, or of each folder of --images; 0 for none (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=fraction, default=0.5, metavar="SCORE",
        help="least score of a detection that is drawn, 0 to 1 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--device", metavar="DEVICE", help="cuda, cuda:1, cpu, to detect on (default: a GPU where there is one)"
    )
    return parser


def find_scenes(args: argparse.Namespace, runs: list[RecordedRun]) -> tuple[list[Scene], str]:
    """The images to detect in, and the reason where there are none.

    Raises:
        UserError: images that the user named are at fault.
    """
    scenes = given_scenes(args.images, args.pictures)
    if args.pictures == 0 and not scenes:
        return [], "none were asked for (--pictures 0)"
    if not any(run.checkpoint for run in runs):
        return [], "no run has a checkpoint to detect with"
    if scenes:
        return scenes, ""
    try:
        return validation_scenes(runs, args.pictures), ""
    except UserError as error:
        return [], f"{error}. --images takes others."


def enumeration(names: list[str]) -> str:
    """The runs' names in a row."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def run(args: argparse.Namespace) -> int:
    """Compare the runs.

    Returns:
        the exit status.

    Raises:
        UserError: something in the arguments or the runs' files is wrong; nothing has been written then.
    """
    names = run_names(args.runs, args.names)
    for file_name in (TABLES, PAGE):
        check_no_folder(args.output_dir / file_name)
    if args.device is not None:
        find_device(args.device)
    runs = [read_run(source, name) for source, name in zip(args.runs, names, strict=True)]
    scenes, reason = find_scenes(args, runs)
    make_folder(args.output_dir)

    unequal = inequalities(runs)
    settings = [table for table in (settings_table(runs), flags_table(runs)) if table]
    figures = [figures_table(runs), costs_table(runs)]
    classes = classes_table(runs)
    shown = list(side_by_side(runs, scenes, args.threshold, args.device))

    title = enumeration(names)
    parts = [f"# {title}", "\n".join(f"- {text}" for text in unequal or [EQUAL])]
    parts += [table.markdown() for table in (*settings, *figures, classes) if table]
    text = "\n\n".join(part for part in parts if part)
    page = build_page(title, runs, unequal, settings, figures, classes, shown, reason, args.threshold)
    for file_name, content in ((TABLES, text + "\n"), (PAGE, page)):
        write_file(args.output_dir / file_name, lambda file, content=content: file.write(content.encode()))
    # After the files: who reads no further than the first lines shall have them all the same.
    print(text)
    if reason:
        print(f"\nno pictures: {reason}")
    print(f"\nwritten to {args.output_dir / PAGE} and {args.output_dir / TABLES}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Compare what the command line names.

    Returns:
        the exit status: 0; 2 for what the user can mend.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    return exit_status(parser.prog, lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
