"""The command `enact`, which runs all of the project's commands.

    enact train detr --coco_path DATA --output_dir OUT
    enact predict IMAGES --checkpoint OUT/checkpoint.pth --output_dir PICTURES

`enact COMMAND --help` lists a command's flags. `python -m enact_common` runs the same program.
"""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence

from enact_common.cli import program
from enact_common.utils.errors import UserError, exit_status

# command: (module below enact_common, description). A module is imported when its command runs.
COMMANDS = {
    "train": ("train", "train a variant: enact train detr|conditional|anchor"),
    "eval": ("train", "evaluate a checkpoint: enact eval --resume CKPT"),
    "predict": ("predict", "detect in images and videos"),
    "explore": ("explore.__main__", "look into a detector in a browser: clusters, attention, settings"),
    "check": ("data.checks.__main__", "find errors in a data set"),
    "convert": ("convert.__main__", "convert Pascal VOC, YOLO, CVAT and other data to COCO's layout"),
    "split": ("split", "split an annotated image folder into train and val"),
    "export": ("export.__main__", "write a detector as ONNX, torch.export or TorchScript"),
    "weights": ("weights.__main__", "list the published weights; say what a checkpoint is"),
    "compare": ("compare.__main__", "compare trainings, with and without ENACT, on one page"),
    "diagnose": ("diagnose.__main__", "find what is wrong with a detector: errors, images, labels"),
    "plots": ("plots.__main__", "draw training curves and precision-recall curves"),
    "benchmark": ("benchmark.__main__", "measure memory, time and operations"),
    "study": ("study.__main__", "measure what ENACT costs in accuracy"),
    "slurm": ("slurm.__main__", "submit a training to a cluster"),
    "demo": ("demo", "train a small model on drawn shapes"),
    "gpu": ("gpu.__main__", "check and measure on a GPU"),
}

COMPLETION = "completion"
SHELLS = ("bash", "zsh")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: command-line arguments; None for those of the process.

    Returns:
        the command's exit status; 2 for an unknown command.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        return exit_status("enact", lambda: without_command(words))
    name, rest = words[0], words[1:]
    module = importlib.import_module(f"enact_common.{COMMANDS[name][0]}")
    program.called_as = f"enact {name}"
    return module.main([*rest, "--eval"] if name == "eval" and rest else rest)


def without_command(words: Sequence[str]) -> int:
    """Handle a command line that starts with none of `COMMANDS`.

    Returns:
        the exit status.

    Raises:
        UserError: the first word is not a command.
    """
    if not words or words[0] in ("-h", "--help"):
        print(help_text())
        return 0 if words else 2
    if words[0] == COMPLETION:
        return print_completion(words[1:])
    near = difflib.get_close_matches(words[0], (*COMMANDS, COMPLETION), 1)
    meant = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"no command {words[0]!r}; {meant}enact --help lists them all")


def help_text() -> str:
    """Return the list of all commands, one per line."""
    lines = [f"  {name:<11} {what}" for name, (_, what) in COMMANDS.items()]
    lines.append(f"  {COMPLETION:<11} print a completion script for {', '.join(SHELLS)}")
    return "usage: enact COMMAND ...\n\n" + "\n".join(lines) + "\n\nenact COMMAND --help lists a command's flags."


def print_completion(words: Sequence[str]) -> int:
    """Print a shell script that completes commands, flags and choices; made by shtab."""
    parser = program.Parser(prog=f"enact {COMPLETION}", description=print_completion.__doc__)
    parser.add_argument("shell", choices=SHELLS)
    shell = parser.parse_args(words).shell
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise UserError("completion needs shtab: pip install 'enact-detection[completion]'") from error
    print(shtab.complete(whole_parser(), shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """Return a parser with all commands' parsers as subparsers."""
    whole = argparse.ArgumentParser(prog="enact")
    commands = whole.add_subparsers()
    for name, (module, what) in COMMANDS.items():
        commands.add_parser(name, help=what)
        # argparse has no public way to add an existing parser.
        commands.choices[name] = importlib.import_module(f"enact_common.{module}").build_parser()
    return whole


if __name__ == "__main__":
    sys.exit(main())
