"""The plots' command line: `python -m enact_common.plots [curves|precision-recall] RUN...`."""

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

from enact_common import plots
from enact_common.cli.program import program
from enact_common.training.run_logs import read_epochs, read_evaluation, run_names
from enact_common.utils.errors import UserError, exit_status
from enact_common.utils.files import check_no_folder

# What is drawn where the command line begins with no command.
DEFAULT = "curves"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program("enact_common.plots"),
        description=plots.__doc__,
        epilog=f"Without a command, {DEFAULT} is meant: python -m enact_common.plots RUN...",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, what, source, output in (
        (
            "curves",
            run_curves,
            "loss, AP and learning rate of one or several runs, epoch by epoch",
            "a run's folder, or its log.txt; the original repositories' too",
            "curves.png",
        ),
        (
            "precision-recall",
            run_precision_recall,
            "precision by recall: of one run at several IoU thresholds, of several runs class by class",
            "a run's folder, or the evaluation.json that training and --eval write to it",
            "precision_recall.png",
        ),
    ):
        command = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
        command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=source)
        command.add_argument(
            "--output", type=Path, default=Path(output), metavar="FILE",
            help="picture to write, of the kind that its suffix says: .png, .svg, .pdf (default: %(default)s)",
        )  # fmt: skip
        command.add_argument(
            "--names", nargs="+", metavar="NAME", help="what to call the runs, in order (default: their folders' names)"
        )
        command.set_defaults(run=run)
    return parser


def drawing(module: str) -> ModuleType:
    """A module that needs matplotlib, by its full name.

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
        UserError: its folder is not there, there is a folder in its place, or matplotlib knows no such kind of picture.
    """
    kinds = drawing("enact_common.drawing.figures").picture_kinds()
    if path.suffix[1:].lower() not in kinds:
        raise UserError(f"--output {path}: no such kind of picture, choose a suffix from .{', .'.join(kinds)}")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.parent}")
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
    """Draw what the command line asks for.

    Returns:
        the exit status: 0; 2 for what the user can mend.
    """
    parser = build_parser()
    words = sys.argv[1:] if argv is None else argv
    # `python -m enact_common.plots outputs/run` is what most ask for.
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
