"""The plots' command line: `python -m enact_common.plots [curves|precision-recall] RUN...`."""

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

from enact_common import plots
from enact_common.cli.program import Parser, program
from enact_common.training.run_logs import read_epochs, read_evaluation, run_names
from enact_common.utils.errors import UserError, exit_status
from enact_common.utils.files import check_no_folder

# The command if none is given.
DEFAULT = "curves"


def build_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = Parser(
        prog=program("enact_common.plots"),
        description=plots.__doc__,
        epilog=f"The default command is {DEFAULT}: python -m enact_common.plots RUN...",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, what, source, output in (
        (
            "curves",
            run_curves,
            "loss, AP and learning rate of one or several runs by epoch",
            "folder of a run, or its log.txt; logs of the original repositories work too",
            "curves.png",
        ),
        (
            "precision-recall",
            run_precision_recall,
            "precision by recall: of one run at several IoU thresholds, of several runs per class",
            "folder of a run, or its evaluation.json, which training and --eval write",
            "precision_recall.png",
        ),
    ):
        command = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
        command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=source)
        command.add_argument(
            "--output", type=Path, default=Path(output), metavar="FILE",
            help="picture to write; its suffix sets the format: .png, .svg, .pdf (default: %(default)s)",
        )  # fmt: skip
        command.add_argument(
            "--names", nargs="+", metavar="NAME", help="names of the runs, in order (default: folder names)"
        )
        command.set_defaults(run=run)
    return parser


def drawing(module: str) -> ModuleType:
    """Import a module that needs matplotlib, by its full name.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise UserError("plots need matplotlib: pip install 'enact-detection[plots]'") from error


def check_output(path: Path) -> None:
    """Refuse a picture that cannot be written.

    Raises:
        UserError: its folder does not exist, the path is a folder, or matplotlib does not support the suffix.
    """
    kinds = drawing("enact_common.drawing.figures").picture_kinds()
    if path.suffix[1:].lower() not in kinds:
        raise UserError(f"--output {path}: unknown picture format; choose a suffix from .{', .'.join(kinds)}")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: folder {path.parent} does not exist; create it first")
    check_no_folder(path)


def run_curves(args: argparse.Namespace) -> None:
    """Draw the runs' curves."""
    names = run_names(args.runs, args.names)
    runs = dict(zip(names, map(read_epochs, args.runs), strict=True))
    drawing("enact_common.plots.curves").plot_curves(runs, args.output)


def run_precision_recall(args: argparse.Namespace) -> None:
    """Draw the runs' precision by recall."""
    names = run_names(args.runs, args.names)
    records = dict(zip(names, map(read_evaluation, args.runs), strict=True))
    drawing("enact_common.plots.precision_recall").plot_precision_recall(records, args.output)


def main(argv: list[str] | None = None) -> int:
    """Draw the requested plot.

    Returns:
        the exit status: 0, or 2 for a user error.
    """
    parser = build_parser()
    words = sys.argv[1:] if argv is None else argv
    # Most calls are `python -m enact_common.plots outputs/run`, without a command.
    commands = ("curves", "precision-recall", "-h", "--help")
    args = parser.parse_args(words if not words or words[0] in commands else [DEFAULT, *words])

    def draw() -> int:
        check_output(args.output)
        args.run(args)
        print(f"written to {args.output}")
        return 0

    return exit_status(parser.prog, draw)


if __name__ == "__main__":
    sys.exit(main())
