"""Read data sets in the Pascal VOC format: one XML file per image.

As in the PASCAL VOC 2007 development kit, pixels are counted from 1, and a box includes its last column and row.
"""

import argparse
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from enact_common.convert.sources import (
    IN_NEITHER,
    SETS,
    Issues,
    Item,
    Object,
    Source,
    divide,
    image_files,
    listed_names,
    note_passed_over,
    number_or_none,
    visible,
)
from enact_common.data.checks.findings import FAULT, WARNING
from enact_common.data.images import search
from enact_common.utils.errors import UserError

WRONG_SIZE = WARNING, "XML files whose image size is missing or wrong: the size of the image file is used"
FROM_ZERO = WARNING, "boxes with a coordinate 0, although VOC counts from 1: are they --zero_based?"
NO_XML = WARNING, "images without an XML file: left out"
BAD_XML = FAULT, "XML files that cannot be read: left out with their images"
BAD_OBJECT = FAULT, "objects without a name or four numbers: dropped"
NO_IMAGE = FAULT, "XML files without an image: left out"
AMBIGUOUS = FAULT, "XML files that fit several images: left out"
NOT_THERE = FAULT, "names in a split's list that have no image: left out"


# The entries of each list: (file and name, for messages; image, or None if missing).
Lists = dict[str, list[tuple[str, Path | None]]]


def find_voc(root: Path, args: argparse.Namespace, issues: Issues) -> Source:
    """Find the images and XML files in a folder like VOC2007, a folder of such folders, or any other folder.

    The splits come from lists in ImageSets/Main, from folders named train and val at any depth, or from a random split.
    """
    candidates = [root] if (root / "Annotations").is_dir() else visible(root, "*", issues)
    kits = [path for path in candidates if (path / "Annotations").is_dir()]
    items: dict[Path, Item] = {}
    lists: Lists = defaultdict(list)
    for kit in kits or [root]:
        folder = kit / "JPEGImages" if (kit / "JPEGImages").is_dir() else kit
        images, xmls = image_files(folder, issues), search(kit / "Annotations" if kits else kit, [".xml"])
        note_passed_over(xmls, issues)
        for image, xml in pair(kit, images, sorted(xmls.files), issues).items():
            items[image] = Item(image, partial(read_voc, xml, args.zero_based, issues))
        for name, entries in read_lists(kit / "ImageSets" / "Main", folder, images, issues).items():
            lists[name] += entries
    if not items:
        raise UserError(
            f"{root}: no XML files with images in this folder; pass a folder like VOC2007 (Annotations/, JPEGImages/), "
            "or any folder with XML files and images"
        )
    return Source(choose(root, items, lists, args, issues), args.classes)


def pair(root: Path, images: list[Path], xmls: list[Path], issues: Issues) -> dict[Path, Path]:
    """Map each image below a folder to its XML file; files without a match are added to the issues.

    An XML file and its image have the same stem, or else the XML file contains the image's name. With several matches,
    the image is in the XML file's folder, in a sub-folder of the same name, or has the name in the XML file.
    """
    by_stem, by_name = defaultdict(list), defaultdict(list)
    for image in images:
        by_stem[image.stem].append(image)
        by_name[image.name].append(image)

    def below(file: Path) -> tuple[str, ...]:
        # Drop the first folder, which is Annotations for XML files and JPEGImages for images.
        return file.parent.relative_to(root).parts[1:]

    pairs: dict[Path, Path] = {}
    for xml in xmls:
        candidates = by_stem[xml.stem]
        if len(candidates) != 1:
            mentioned = mentioned_image(xml)
            candidates = candidates or by_name[mentioned]
            choices = (
                [image for image in candidates if image.parent == xml.parent],
                [image for image in candidates if below(image) == below(xml)],
                [image for image in candidates if image.name == mentioned],
            )
            candidates = next((choice for choice in choices if len(choice) == 1), candidates)
        free = [image for image in candidates if image not in pairs]
        if len(free) == 1:
            pairs[free[0]] = xml
        else:
            issues.add(AMBIGUOUS if free else NO_IMAGE, str(xml))
    for image in images:
        if image not in pairs:
            issues.add(NO_XML, str(image))
    return pairs


def mentioned_image(xml: Path) -> str:
    """The image's file name in an XML file; empty if missing or unreadable."""
    try:
        return Path((parse(xml).findtext("filename") or "").strip().replace("\\", "/")).name
    except ValueError:
        return ""


def read_lists(folder: Path, image_folder: Path, images: list[Path], issues: Issues) -> Lists:
    """Read the lists of a folder like ImageSets/Main: names of images with or without suffix and sub-folder."""
    by_name = {image.relative_to(image_folder).with_suffix("").as_posix(): image for image in images}
    by_name |= {image.relative_to(image_folder).as_posix(): image for image in images}
    by_name |= {image.stem: image for image in images if image.stem not in by_name}
    return {
        file.stem: [(f"{file}: {name}", by_name.get(name)) for name in listed_names(file)]
        for file in visible(folder, "*.txt", issues)
    }


def choose(
    root: Path, items: dict[Path, Item], lists: Lists, args: argparse.Namespace, issues: Issues
) -> dict[str, list[Item]]:
    """Split the items into "train" and "val" by lists, else by folders, else at random."""
    listed = {name: [image for _, image in entries] for name, entries in lists.items()}
    folders: dict[str, list[Path | None]] = defaultdict(list)
    for image in items:
        for name in set(image.relative_to(root).parts[:-1]):
            folders[name].append(image)
    requested, all_places = (args.train_set, args.val_set), folders | listed
    missing = [name for name in requested if name and name not in all_places]
    if missing:
        available = f"lists: {', '.join(sorted(lists)) or 'none'}; folders: {', '.join(sorted(folders)) or 'none'}"
        raise UserError(
            f"{root}: no list ImageSets/Main/{missing[0]}.txt and no folder {missing[0]} with annotated images "
            f"(--train_set, --val_set); {available}"
        )

    def part(name: str, places: dict[str, list[Path | None]]) -> list[Item]:
        if places is not folders:
            for where, image in lists.get(name, ()):
                if image is None:
                    issues.add(NOT_THERE, where)
        # Listed images without an XML file are already reported.
        return [items[image] for image in dict.fromkeys(places[name]) if image in items]

    choices = (
        [(requested, all_places)]
        if all(requested)
        else [(sets, places) for places in (listed, folders) for sets in SETS]
    )
    names, places = next(
        ((names, places) for names, places in choices if all(name in places for name in names)), (None, None)
    )
    if names:
        splits = {split: part(name, places) for split, name in zip(("train", "val"), names, strict=True)}
    else:
        whole = next((name for name in ("trainval", "train") if name in listed), None)
        splits = divide(part(whole, listed) if whole else list(items.values()), args, issues)
    unused = items.keys() - {item.image for own in splits.values() for item in own}
    for folder, count in sorted(Counter(image.parent for image in unused).items()):
        issues.add(IN_NEITHER, f"{folder}: {count} images")
    return splits


class NoDoctype(ElementTree.TreeBuilder):
    """A tree builder that refuses document types, whose entities may expand without end."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        """Called by the parser before it reads the declarations."""
        raise ValueError("it declares a document type, which is not safe to read and not part of the format; remove it")


def parse(path: Path, tag: str = "annotation") -> ElementTree.Element:
    """Return the root element of an XML file, which must have this tag.

    Raises:
        ValueError: the file cannot be read, is not XML, declares a document type, or has another root.
    """
    try:
        root = ElementTree.parse(path, ElementTree.XMLParser(target=NoDoctype())).getroot()
    except (OSError, ElementTree.ParseError, LookupError) as error:
        raise ValueError(getattr(error, "strerror", None) or str(error)) from error
    if root.tag != tag:
        raise ValueError(f"its root is <{root.tag}>, not <{tag}>")
    return root


def read_voc(xml: Path, zero_based: bool, issues: Issues, width: int, height: int) -> list[Object] | None:
    """Read the objects of an XML file; None if it cannot be read.

    With `zero_based`, coordinates start at 0, and xmax and ymax are the first pixels outside the box.
    """
    try:
        tree = parse(xml)
    except ValueError as error:
        issues.add(BAD_XML, f"{xml}: {error}")
        return None
    size = [(tree.findtext(f"size/{side}") or "").strip() for side in ("width", "height")]
    if [number_or_none(side) for side in size] != [width, height]:
        issues.add(WRONG_SIZE, f"{xml}: {' x '.join(side or '?' for side in size)}, the image is {width} x {height}")
    objects = []
    for number, element in enumerate(tree.findall("object"), start=1):
        name = (element.findtext("name") or "").strip()
        where = f"{xml}: object {number}, {name or 'without a name'}"
        sides = [(element.findtext(f"bndbox/{side}") or "").strip() for side in ("xmin", "ymin", "xmax", "ymax")]
        corners = [number_or_none(side) for side in sides]
        if not name or None in corners:
            issues.add(BAD_OBJECT, f"{where}: {', '.join(side or '?' for side in sides)}")
            continue
        left, top, right, bottom = corners
        if not zero_based:
            if 0 in (left, top):
                issues.add(FROM_ZERO, where)
            # Keep right and bottom: the edge of the last pixel, counted from 1, is at its number.
            left, top = left - 1, top - 1
        difficult = (element.findtext("difficult") or "").strip() == "1"
        objects.append(Object(name, (left, top, right, bottom), where, difficult))
    return objects
