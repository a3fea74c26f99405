"""Split an annotated image folder into train and val: stratified by class, by whole images or groups of them.

    python -m enact_common.split IMAGES ANNOTATIONS.json --output_dir OUT

writes OUT in the COCO layout that `--coco_path` takes. Annotations are copied unchanged. The same seed gives the same
split.
"""

import argparse
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from enact_common.cli.program import Parser, program
from enact_common.cli.types import HelpFormatter
from enact_common.convert.__main__ import STATUS, Conversion, add_output_flags, check_output, finish
from enact_common.convert.sources import NO_FILE, Issues
from enact_common.data.annotations import check_file_names, load_lists, missing_files
from enact_common.data.checks.findings import FAULT, NOTE, WARNING
from enact_common.data.values import is_id
from enact_common.utils.errors import UserError, exit_status

OWN_GROUP = NOTE, "images whose names --group_by does not match: each is a group of its own"
ONE_SPLIT = WARNING, "classes whose images are all in one split, as all of them are in one group"
ORPHANS = FAULT, "annotations of images or classes that the file does not list: left out"


def split_groups(groups: Sequence[Counter], fraction: float, seed: int) -> set[int]:
    """Choose groups of images for val, so that val holds a fraction of the images and of each class's images.

    Iterative stratification (Sechidis et al., ECML PKDD 2011), for two parts and for groups: the class with the fewest
    images left goes first, and each of its groups goes to the part that lacks more images of that class.

    Args:
        groups: for each group, the number of its images with each class; the key None counts all its images.
        fraction: of val, in (0, 1).
        seed: decides ties.

    Returns:
        the indices of the groups in val: at least one, and not all.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(groups)).tolist()
    total = sum(groups, Counter())
    # How many images val and train still lack, by class.
    wanted = {True: {key: count * fraction for key, count in total.items()}}
    wanted[False] = {key: count - wanted[True][key] for key, count in total.items()}
    by_class: dict[Hashable, list[int]] = defaultdict(list)
    for i in order:
        for key in groups[i]:
            by_class[key].append(i)
    left, val, placed = Counter(total), set(), set()
    # None, which counts all images, comes last, for images without objects.
    keys = {key for key in total if key is not None}
    while len(placed) < len(groups):
        rarest = min(keys, key=lambda key: (left[key], str(key))) if keys else None
        keys.discard(rarest)
        # Large groups first: small ones can still fill what is missing.
        for i in sorted((i for i in by_class[rarest] if i not in placed), key=lambda i: -groups[i][rarest]):
            need = {part: (wanted[part][rarest], wanted[part][None]) for part in (True, False)}
            part = need[True] > need[False]
            placed.add(i)
            val |= {i} if part else set()
            for key, count in groups[i].items():
                wanted[part][key] -= count
                left[key] -= count
    if not val:
        val = {min(order, key=lambda i: groups[i][None])}
    if len(val) == len(groups):
        val.remove(max(order, key=lambda i: groups[i][None]))
    return val


def group_images(images: Sequence[dict], pattern: re.Pattern | None, issues: Issues) -> list[list[dict]]:
    """Group images by the first group of a pattern's match in their file names, or the whole match if it has no group.

    Without a pattern, each image is alone. The issues collect images without a match.

    Raises:
        UserError: the pattern matches no name.
    """
    groups: dict[Hashable, list[dict]] = defaultdict(list)
    for image in images:
        match = pattern.search(image["file_name"]) if pattern else None
        if match:
            groups["group", match[1] if pattern.groups else match[0]].append(image)
        else:
            # By name: a file that is listed twice must not be in both parts.
            groups["image", image["file_name"]].append(image)
            if pattern:
                issues.add(OWN_GROUP, image["file_name"])
    if pattern and not any(kind == "group" for kind, _ in groups):
        raise UserError(f"--group_by {pattern.pattern}: matches no file_name, such as {images[0]['file_name']}")
    return list(groups.values())


def split(args: argparse.Namespace) -> Conversion:
    """Split a data set; a UserError says which argument or data are not usable."""
    folder, file = Path(args.images_dir), Path(args.annotations)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; pass the folder of the images, then their COCO-format JSON")
    check_output(Path(args.output_dir), args.seed)
    issues = Issues()
    data = load_lists(file, ("images", "annotations", "categories"))
    check_file_names(data["images"], folder, file)
    missing = set(missing_files(folder / image["file_name"] for image in data["images"])[0])
    for path in missing:
        issues.add(NO_FILE, str(path))
    images = [image for image in data["images"] if folder / image["file_name"] not in missing]
    if not images:
        raise UserError(f"{file}: none of its {len(data['images'])} images is in {folder}; pass the images' folder")
    groups = group_images(images, args.group_by, issues)
    if len(groups) < 2:
        what = f"--group_by {args.group_by.pattern} puts all" if args.group_by else f"{file} has all"
        raise UserError(f"{what} {len(images)} images in one group: train and val need two")

    names = {category["id"]: str(category["name"]) for category in data["categories"]}
    objects: dict[int, list[dict]] = {image["id"]: [] for image in images}
    listed = {image["id"] for image in data["images"]}
    for number, annotation in enumerate(data["annotations"], start=1):
        ids = (annotation.get("category_id"), annotation.get("image_id")) if isinstance(annotation, dict) else ()
        if not ids or not all(map(is_id, ids)) or ids[0] not in names or ids[1] not in listed:
            issues.add(ORPHANS, f"{file}: annotation {number}: {str(annotation)[:80]}")
        elif annotation["image_id"] in objects:
            objects[annotation["image_id"]].append(annotation)
    counts = [
        sum((Counter({None: 1} | {a["category_id"]: 1 for a in objects[image["id"]]}) for image in group), Counter())
        for group in groups
    ]
    for category, name in names.items():
        if sum(category in count for count in counts) == 1:
            issues.add(ONE_SPLIT, name)
    val = split_groups(counts, args.val_fraction, args.seed)
    annotations, files = {}, {}
    for part in ("train", "val"):
        chosen = [image for i, group in enumerate(groups) if (i in val) == (part == "val") for image in group]
        chosen.sort(key=lambda image: image["id"])
        own = [annotation for image in chosen for annotation in objects[image["id"]]]
        annotations[part] = {**data, "images": chosen, "annotations": own}
        files[part] = {image["file_name"]: folder / image["file_name"] for image in chosen}
    return Conversion(annotations, files, issues)


def pattern(text: str) -> re.Pattern:
    """A regular expression, for argparse."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression ({error}): {text}") from error


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog=program("enact_common.split"), description=__doc__.splitlines()[0], epilog=STATUS,
        formatter_class=HelpFormatter,
    )  # fmt: skip
    parser.add_argument("images_dir", metavar="IMAGES", help="folder of the images")
    parser.add_argument("annotations", metavar="ANNOTATIONS", help="COCO-format JSON of the images")
    add_output_flags(parser)
    parser.add_argument(
        "--group_by", type=pattern, metavar="REGEX",
        help="keep images together whose file names share the match of this regular expression, or of its first "
        "group: '^(.*)/' keeps folders together, '^([^_]*)_' all of patient7_01.jpg, patient7_02.jpg; default: no "
        "groups",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Split a data set; return 0, 1 if images or annotations were left out, 2 for user errors."""
    parser = build_parser()
    args = parser.parse_args(argv)
    return exit_status(parser.prog, lambda: finish(split(args), args))


if __name__ == "__main__":
    sys.exit(main())
