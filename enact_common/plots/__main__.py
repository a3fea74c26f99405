"""The plots' command line: `python -m enact_common.plots [curves|precision-recall] RUN...`."""

import argparse
import importlib
import sys
from pathlib import Path

from enact_common import plots
from enact_common.cli.checks import is_installed
from enact_common.cli.program import Parser, program
from enact_common.training.run_logs import read_epochs, read_evaluation, run_names
from enact_common.utils.errors import UserError, exit_status
from enact_common.utils.files import check_no_folder

# The command if none is given.
DEFAULT = "curves"

# Per command: what it draws, the reader of a run, and the file that the reader takes. The module with the command's
# name (`_` for `-`) draws.
COMMANDS = {
    "curves": (
        "loss, AP and learning rate of one or several runs by epoch", read_epochs,
        "log.txt; logs of the original repositories work too",
    ),
    "precision-recall": (
        "precision by recall: of one run at several IoU thresholds, of several runs per class", read_evaluation,
        "evaluation.json, which training and --eval write",
    ),
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = Parser(
        prog=program("enact_common.plots"),
        description=plots.__doc__,
        epilog=f"The default command is {DEFAULT}: python -m enact_common.plots RUN...",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (what, _, source) in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
        command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=f"folder of a run, or its {source}")
        command.add_argument(
            "--output", type=Path, default=Path(f"{name.replace('-', '_')}.png"), metavar="FILE",
            help="picture to write; its suffix sets the format: .png, .svg, .pdf (default: %(default)s)",
        )  # fmt: skip
        command.add_argument(
            "--names", nargs="+", metavar="NAME", help="names of the runs, in order (default: folder names)"
        )
    return parser


def check_output(path: Path) -> None:
    """Refuse a picture whose folder does not exist, that is a folder, or whose suffix matplotlib does not support."""
    if not is_installed("matplotlib"):
        raise UserError("plots need matplotlib: pip install 'enact-detection[plots]'")
    from enact_common.drawing.figures import picture_kinds

    kinds = picture_kinds()
    if path.suffix[1:].lower() not in kinds:
        raise UserError(f"--output {path}: unknown picture format; choose a suffix from .{', .'.join(kinds)}")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: folder {path.parent} does not exist; create it first")
    check_no_folder(path)


def main(argv: list[str] | None = None) -> int:
    """Draw the requested plot; return 0, or 2 for a user error."""
    parser = build_parser()
    words = sys.argv[1:] if argv is None else argv
    # Most calls are `python -m enact_common.plots outputs/run`, without a command.
    args = parser.parse_args(words if not words or words[0] in (*COMMANDS, "-h", "--help") else [DEFAULT, *words])

    def draw() -> int:
        check_output(args.output)
        _, read, _ = COMMANDS[args.command]
        runs = dict(zip(run_names(args.runs, args.names), map(read, args.runs), strict=True))
        name = args.command.replace("-", "_")
        getattr(importlib.import_module(f"enact_common.plots.{name}"), f"plot_{name}")(runs, args.output)
        print(f"written to {args.output}")
        return 0

    return exit_status(parser.prog, draw)


if __name__ == "__main__":
    sys.exit(main())
