"""The benchmarks' command line: `python -m enact_common.benchmark COMMAND`."""

import argparse
import sys

from enact_common import benchmark
from enact_common.benchmark import agreement, masks, parts, pipeline, rowcol, runtimes, scaling, table
from enact_common.cli.program import Parser, program
from enact_common.utils.errors import exit_status

MODULES = (table, parts, scaling, pipeline, rowcol, masks, runtimes, agreement)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with one subcommand per benchmark."""
    parser = Parser(prog=program("enact_common.benchmark"), description=benchmark.__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for module in MODULES:
        text = " ".join(module.__doc__.split())
        command = commands.add_parser(module.__name__.rpartition(".")[2], help=text, description=text)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a benchmark; return 0, 1 if a measurement failed, or 2 for an error that the user can fix."""
    parser = build_parser()
    args = parser.parse_args(argv)
    # The reports record the command that produced the figures.
    args.argv = sys.argv[1:] if argv is None else argv
    return exit_status(parser.prog, lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
