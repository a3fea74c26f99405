"""List the published checkpoints, and say what a checkpoint is: `python -m enact_common.weights --check FILE`.

Without arguments, the command lists every published checkpoint of the three detectors: its name, its AP on COCO
val2017 as its authors report it, where it is, and the command that evaluates it. With --check, it says which model a
file or folder is, whether it loads here, and how to evaluate it. With --shrink, it writes a small file to share.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from enact_common.checkpoints.bundled import BUNDLED
from enact_common.checkpoints.contents import (
    IMAGE_FLAGS,
    UNRECORDED,
    arguments_of,
    default_arguments,
    known_variant,
    model_words,
)
from enact_common.checkpoints.files import flag_text, load_checkpoint
from enact_common.checkpoints.published import FILES, HUGGING_FACE, Model, PublishedFile
from enact_common.cli.flags import PANOPTIC, with_flags
from enact_common.cli.program import Parser, program
from enact_common.cli.types import HelpFormatter
from enact_common.data.categories import LabelMap
from enact_common.data.panoptic import NUM_CLASSES
from enact_common.inference.detector import detector_parts
from enact_common.models.backbone import SHALLOW_BACKBONES
from enact_common.models.detector import COCO_CLASSES
from enact_common.utils.download import HASH_IN_NAME, is_url, sha256
from enact_common.utils.errors import UserError, exit_status
from enact_common.utils.files import make_folder
from enact_common.weights.sharing import EnactDetector

LEGEND = """DIR is the data set's folder, FILE the downloaded file. AP is COCO val2017's, as the authors report it.
Only the names of DETR's seven files (dl.fbaipublicfiles.com) hold a hash of their content."""

# The first names of a model's classes in a report.
MOST_NAMES = 4


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog=program("enact_common.weights"), description=" ".join(__doc__.split("\n\n", 1)[1].split()),
        formatter_class=HelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--check", metavar="FILE",
        help="say what this checkpoint is: a file, an https URL with the file's hash, a folder with a config.json, or "
        f"a bundled detector: {', '.join(BUNDLED)}",
    )  # fmt: skip
    parser.add_argument(
        "--shrink", metavar="FILE",
        help="write this checkpoint without the state of its training, and with half-precision weights, to --output",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FILE", help="file to write with --shrink; it must not exist")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 for a checkpoint that does not load, or 2 for user errors."""
    parser = build_parser()
    args = parser.parse_args(argv)
    return exit_status(parser.prog, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Do what the arguments ask for; return the exit status."""
    if (args.shrink is None) != (args.output is None):
        raise UserError("--shrink FILE and --output FILE need each other: pass both")
    if args.shrink is not None and args.check is not None:
        raise UserError("--check and --shrink are two tasks: pass one of them")
    if args.shrink is not None:
        return shrink(args.shrink, Path(args.output))
    return list_files() if args.check is None else check(args.check)


def list_files() -> int:
    """Print all published checkpoints."""
    for file in FILES:
        epochs = f", {file.epochs} epochs" if file.epochs else ""
        backbone = file.model.backbone.replace("resnet", "ResNet-")
        print(f"{file.name}: {file.model.authors_title}, {backbone}{epochs}, AP {file.ap}")
        print(f"  file      {file.url}")
        if file.log:
            print(f"  log       {file.log}")
        if file.hugging_face:
            print(f"  same in   {HUGGING_FACE.format(file.hugging_face)}")
        print(f"  evaluate  {evaluation('FILE', published_arguments(file.model), file.model.variant)}\n")
    print(LEGEND)
    return 0


def published_arguments(model: Model) -> argparse.Namespace:
    """Return the arguments that build a published model."""
    return with_flags(default_arguments(model.variant), **model.flags)


def evaluation(source: str, args: argparse.Namespace, variant: str) -> str:
    """Return the command that evaluates a checkpoint."""
    words = ["enact", "eval", variant, "--coco_path", "DIR", "--resume", shlex.quote(source)]
    return " ".join([*words, *model_words(args, variant), *size_words(args, variant)])


def size_words(args: argparse.Namespace, variant: str) -> list[str]:
    """Return the command-line words for a model's image sizes, if they are not the defaults."""
    defaults = default_arguments(variant)
    differing = [flag for flag in IMAGE_FLAGS if getattr(args, flag) != getattr(defaults, flag)]
    words = [flag_text(flag, getattr(args, flag)) for flag in differing]
    # The parser compares --max_size with the training's sizes too.
    return words + ([f"--train_sizes {args.eval_size}"] if args.max_size < max(defaults.train_sizes) else [])


def check(source: str) -> int:
    """Print what a checkpoint is, whether it loads, and the command that evaluates it; return 1 if it does not load.

    Raises:
        UserError: it is not a checkpoint, or of no variant.
    """
    state = load_checkpoint(source)
    variant = known_variant(state, source)
    args, label_map = arguments_of(state, variant)
    model = Model.of(args, variant)
    print(f"{source}: {model.title}{', with a mask head for instances' * (args.masks and not model.panoptic)}")
    count = sum(tensor.numel() for tensor in state["model"].values())
    print(f"  tensors     {len(state['model'])}, with {count / 1e6:.1f} million numbers")
    print(f"  classes     {classes_text(label_map)}")
    candidates = [with_flags(args, dilation=dilation) for dilation in possible_dilations(state, args)]
    text, candidates = origin(state, source, candidates, variant, label_map)
    print(f"  origin      {text}")
    # The flags are given, so that a warning about their defaults is not repeated.
    flags = {flag: getattr(candidates[0], flag) for flag in UNRECORDED}
    try:
        detector_parts(state, source, torch.device("cpu"), None, None, flags)
    except UserError as error:
        print(f"  loads here  no: {error}")
        return 1
    print("  loads here  yes")
    for candidate in candidates:
        print(f"  evaluate    {evaluation(source, candidate, variant)}")
    if len(candidates) > 1:
        print("              The tensors do not show whether the backbone is dilated: take the command of your model.")
    return 0


def shrink(source: str, output: Path) -> int:
    """Write a checkpoint as a small file that all commands take, and print both sizes."""
    if output.exists():
        raise UserError(f"--output {output}: already exists; choose another name")
    if output.suffix == ".safetensors":
        # Commands tell this format by the suffix.
        raise UserError(f"--output {output}: --shrink writes a file of PyTorch; choose a name that ends with .pth")
    detector = EnactDetector.from_pretrained(source, "cpu")
    make_folder(output.parent, "--output")
    detector.save_file(output)
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB of weights and settings, without a training's state")
    return 0


def classes_text(label_map: LabelMap) -> str:
    """Return the number of labels and the first names in words."""
    known = label_map.known_names()
    more = ", ..." if len(known) > MOST_NAMES else ""
    unused = label_map.num_classes - len(known)
    return f"{label_map.num_classes} labels{f', {unused} unused' * bool(unused)}: {', '.join(known[:MOST_NAMES])}{more}"


def possible_dilations(state: dict[str, Any], args: argparse.Namespace) -> tuple[bool, ...]:
    """Return the values of `--dilation` that fit a checkpoint, the likelier first."""
    if "dilation" in state["args"] or args.backbone in SHALLOW_BACKBONES:
        return (args.dilation,)
    return (args.dilation, not args.dilation)


def origin(
    state: dict[str, Any], source: str, candidates: list[argparse.Namespace], variant: str, label_map: LabelMap
) -> tuple[str, list[argparse.Namespace]]:
    """Say which published file a checkpoint is or may be, by the `candidates`, arguments that fit it.

    Returns the origin in words, and those of the arguments that remain.
    """
    if "variant" in state:
        epoch = f", after epoch {state['epoch']}" if isinstance(state.get("epoch"), int) else ""
        return f"a training of this project{epoch}", candidates
    expected = NUM_CLASSES if candidates[0].dataset_file == PANOPTIC else COCO_CLASSES
    published = {file.model: file for file in FILES}
    fitting: list[tuple[PublishedFile, argparse.Namespace]] = []
    for args in candidates:
        model = Model.of(args, variant)
        same_sizes = model_words(args, variant) == model_words(published_arguments(model), variant)
        if model in published and label_map.num_classes == expected and same_sizes:
            fitting.append((published[model], args))
    if not fitting:
        return "not a published file: other parts, sizes or classes than all of these", candidates
    path = Path(source)
    if not is_url(source) and path.is_file():
        digits = {HASH_IN_NAME.search(file.url): (file, args) for file, args in fitting}
        digest = sha256(path) if any(digits) else ""
        for found, (file, args) in digits.items():
            if found and digest.startswith(found[1]):
                return f"the published {file.name}, by its SHA-256 (AP {file.ap})", [args]
    names = " or ".join(f"{file.name} (AP {file.ap})" for file, _ in fitting)
    return f"the tensors fit the published {names}, or a training of the same model", candidates


if __name__ == "__main__":
    sys.exit(main())
