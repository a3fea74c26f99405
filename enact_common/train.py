"""Train or evaluate a variant: `enact train detr` is the same as `python DETR-ENACT/main.py`.

With `--resume CKPT` the variant may be left out; it comes from the checkpoint.
"""

import argparse
import sys
from collections.abc import Sequence

from enact_common.checkpoints.contents import known_variant
from enact_common.checkpoints.files import load_checkpoint
from enact_common.cli.program import Parser, program
from enact_common.training.run import main as run_main
from enact_common.utils.errors import exit_status
from enact_common.variants import VARIANTS, load_variant


def build_parser() -> argparse.ArgumentParser:
    """Return a parser with the variants' parsers as subcommands, for the help and shell completion."""
    parser = Parser(prog=program("enact_common.train"), description=__doc__)
    variants = parser.add_subparsers(dest="variant", metavar="VARIANT", required=True)
    for name, (folder, _) in VARIANTS.items():
        variants.add_parser(name, help=f"same as python {folder}/main.py", add_help=False)
        variants.choices[name] = load_variant(name).main.get_args_parser()
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a variant's command line.

    Args:
        argv: the variant (optional with `--resume`), then its flags; None for `sys.argv`.

    Returns:
        the exit status of `training.run.main`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].startswith("-") and (source := resumed(words)):
        status = exit_status(program("enact_common.train"), lambda: words.insert(0, variant_of(source)) or 0)
        if status:
            return status
    if not words or words[0] not in VARIANTS:
        build_parser().parse_args(words[:1])  # prints the help, or the error
    variant, *flags = words
    package = load_variant(variant)
    parser = package.main.get_args_parser()
    parser.prog = f"{program('enact_common.train')} {variant}"
    return run_main(variant, parser, package.models.build_model, package.datasets.build_dataset, flags)


def resumed(words: Sequence[str]) -> str | None:
    """Return the checkpoint that a command line's `--resume` names; None without one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", nargs="?")  # "?": the variant's parser reports a missing value
    return parser.parse_known_args(list(words))[0].resume


def variant_of(source: str) -> str:
    """Return the variant of a checkpoint's model.

    Args:
        source: path or URL of the checkpoint.

    Raises:
        UserError: the checkpoint cannot be read, or its variant is unknown.
    """
    return known_variant(load_checkpoint(source), source)


if __name__ == "__main__":
    sys.exit(main())
