"""The rules that a data set is checked by: each finds one kind of fault, and names its first cases."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from enact_common.data.annotations import missing_files
from enact_common.data.categories import LabelMap
from enact_common.data.checks.findings import ERROR, FAULT, NOTE, WARNING, Finding, by_severity, if_any
from enact_common.data.checks.images import StoredImage, file_size, inspect_images
from enact_common.data.checks.split import Split, shorten
from enact_common.data.images import image_suffixes, is_hidden
from enact_common.data.masks import normalize_all, normalize_size
from enact_common.data.names import hint, other_name
from enact_common.data.values import BOX_WANTED, ID_WANTED, as_mark, is_area, is_id, is_integer, is_set, shown
from enact_common.utils.errors import UserError

# A finding that a training words in its own way.
NOTHING_TO_MEASURE = "no boxes: COCO's figures will all be -1"

# Pixels by which annotation tools round boxes over the image's edge.
EDGE_SLACK = 1.0

MEND = "write its path below that folder, with slashes, as file_name into {}"


# What is wrong -------------------------------------------------------------------------------------------------------


def check_annotations(split: Split, num_queries: int) -> list[Finding]:
    """Faults of a split's JSON alone.

    Args:
        split: whose annotations.
        num_queries: of the model, which finds at most so many objects in an image.
    """
    findings = check_entries(split)
    if split.name != "test" and "annotations" not in split.missing:
        findings += check_ids(split) + check_boxes(split) + check_counts(split, num_queries)
        findings += check_masks(split)
    return findings


def check_entries(split: Split) -> list[Finding]:
    """Lists that are missing or empty, entries that lack something, and ids that stand twice."""
    source, findings = split.name, if_any(ERROR, split.name, f"{split.file.name} lacks a list", split.missing, repr)
    if split.rewritten.counts:
        count, examples = split.rewritten.counts.total(), tuple(split.rewritten.examples)
        findings.append(Finding(WARNING, source, str(split.rewritten), count, examples))
    for key, needs in (
        ("images", "an id and a file_name"),
        ("categories", "an id and a name"),
        ("annotations", "the form of a JSON object"),
    ):
        entries, malformed = getattr(split, key), split.malformed[key]
        wrong, lacking = [], []
        for entry in malformed:
            if isinstance(entry, dict) and "id" in entry and not is_id(entry["id"]):
                wrong.append(entry)
            elif key != "images" or not other_name(entry):  # `check_names` tells of those
                lacking.append(entry)
        text = f"ids in {key!r} that cannot be used: {ID_WANTED}"
        findings += if_any(ERROR, source, text, wrong, lambda entry: f"{shown(entry['id'])} in {shorten(entry)}")
        findings += if_any(ERROR, source, f"entries of {key!r} without {needs}", lacking, shorten)
        if key == "annotations":
            continue
        if not (entries or malformed or key in split.missing or (key == "images" and split.outside)):
            findings.append(Finding(ERROR, source, f"the list {key!r} is empty: nothing to learn", 1))
        twice = [i for i, count in Counter(entry["id"] for entry in entries).items() if count > 1]
        findings += if_any(ERROR, source, f"ids that stand twice in {key!r}", twice)

    findings += check_names(split)
    files = Counter(image["file_name"] for image in split.images)
    twice = [name for name, count in files.items() if count > 1]
    text = "image files listed under two ids: each time with a part of the boxes, or counted twice"
    findings += if_any(FAULT, source, text, twice)
    names = Counter(str(category["name"]) for category in split.categories)
    twice = [name for name, count in names.items() if count > 1]
    findings += if_any(WARNING, source, "names that two categories share", twice, repr)

    def stated(i: int) -> str:
        width, height = (shorten(split.images[i].get(side, "?")) for side in ("width", "height"))
        return f"{split.images[i]['file_name']}: {width} x {height}"

    text = "images without width and height above 0: whether boxes lie inside is not checked"
    return findings + if_any(WARNING, source, text, np.flatnonzero(np.isinf(split.sizes[:, 0])), stated)


def check_names(split: Split) -> list[Finding]:
    """Images without a file_name, or with one that leads out of the folder; each with the file that it may mean."""
    nameless = [(image, *other) for image in split.malformed["images"] if (other := other_name(image))]
    if not (nameless or split.outside):
        return []
    index, listing = split.file_index(), split.file.name
    text = (
        f"images without a file_name, whose file another field names, as LVIS's coco_url: write the file's path below "
        f"{split.folder} as file_name into {listing}"
    )
    outside = f"images whose file_name is no file in {split.folder} or below it: {MEND.format(listing)}"

    def describe(case: tuple[dict, str, str]) -> str:
        entry, key, name = case
        return f"image {shorten(entry.get('id'))}: {key} {shorten(repr(name))}{hint(name, index)}"

    return [
        *if_any(ERROR, split.name, text, nameless, describe),
        *if_any(
            ERROR, split.name, outside, split.outside,
            lambda i: f"image {i['id']}: {shorten(repr(i['file_name']))}{hint(i['file_name'], index)}",
        ),
    ]  # fmt: skip


def check_ids(split: Split) -> list[Finding]:
    """Annotation ids that pycocotools goes wrong with. This project's loader numbers annotations anew."""
    source, ids = split.name, [annotation.get("id") for annotation in split.annotations]
    anew = "here they are numbered anew"
    whole = [i for i in ids if is_integer(i)]
    others = [repr(i) for i in ids if not is_integer(i)] if len(whole) < len(ids) else []
    counts = Counter(whole) if len(set(whole)) < len(whole) else {}
    twice = [f"id {i}, {count} times" for i, count in counts.items() if count > 1]
    return [
        *if_any(WARNING, source, f"annotations whose id is missing or no integer: pycocotools fails; {anew}", others),
        *if_any(WARNING, source, f"annotation ids that are repeated: pycocotools gives an AP near 0; {anew}", twice),
        *if_any(
            WARNING, source, f"annotations with id 0: pycocotools never counts them as found; {anew}",
            [i for i, number in enumerate(ids) if is_integer(number) and number == 0], split.describe,
        ),
    ]  # fmt: skip


def check_boxes(split: Split) -> list[Finding]:
    """Annotations of nothing, and boxes that are none or lie outside."""
    source, boxes = split.name, split.boxes
    readable, positive = ~np.isnan(boxes[:, 0]), (boxes[:, 2:] > 0).all(axis=1)
    corners, clipped = split.edges
    inside = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
    beyond = readable & positive & inside & (np.abs(corners - clipped) > EDGE_SLACK).any(axis=1)

    def reference(key: str) -> Callable[[int], str]:
        word = key.removesuffix("_id")
        return lambda i: f"annotation {split.annotations[i].get('id')}: {word} {shown(split.annotations[i].get(key))}"

    def references(key: str, entries: str) -> tuple[np.ndarray, np.ndarray]:
        """Which annotations have no id there, and which have one that no entry has."""
        ids, known = [a.get(key) for a in split.annotations], split.known_ids(entries)
        usable = np.array([is_id(i) for i in ids], dtype=bool)
        unknown = [is_id(i) and i not in known for i in ids]
        return ~usable, np.array(unknown, dtype=bool)

    def stated(key: str) -> Callable[[int], str]:
        return lambda i: f"annotation {split.annotations[i].get('id')}: {shorten(repr(split.annotations[i][key]))}"

    def odd(key: str, usable: Callable[[Any], bool]) -> np.ndarray:
        return np.array([key in a and not usable(a[key]) for a in split.annotations], dtype=bool)

    def no_mark(key: str) -> tuple[str, str, np.ndarray, Callable[[int], str]]:
        text = f"values of {key} that are neither 0 nor 1: taken as 0"
        return WARNING, text, odd(key, lambda value: as_mark(value) is not None), stated(key)

    no_image, other_image = references("image_id", "images")
    no_category, other_category = references("category_id", "categories")
    findings = []
    for severity, text, which, describe in (
        (ERROR, f"annotations whose image_id is no id: {ID_WANTED}", no_image, reference("image_id")),
        (ERROR, f"annotations whose category_id is no id: {ID_WANTED}", no_category, reference("category_id")),
        (ERROR, "annotations of images that are not listed", other_image, reference("image_id")),
        (ERROR, "annotations of categories that are not listed", other_category, reference("category_id")),
        (ERROR, f"boxes that cannot be read: {BOX_WANTED}", ~readable, split.describe),
        (FAULT, "boxes without width or height: dropped", readable & ~positive, split.describe),
        (FAULT, "boxes wholly outside their image: dropped", readable & positive & ~inside, split.describe),
        (WARNING, "boxes that reach over the image's edge by more than a pixel: clipped", beyond, split.describe),
        (WARNING, "boxes that repeat another of the same class in their image", repeated(split), split.describe),
        (WARNING, "areas that are no number from 0 on: the box's is taken", odd("area", is_area), stated("area")),
        no_mark("iscrowd"),
        no_mark("ignore"),
    ):
        findings += if_any(severity, source, text, np.flatnonzero(which), describe)

    if readable.any():
        box = boxes[readable]
        if (np.abs(box) <= 1).all():
            text = "all boxes lie within 0 and 1: fractions of the image, it seems; COCO's are in pixels"
            findings += if_any(FAULT, source, text, np.flatnonzero(readable), split.describe)
        if beyond.sum() > 0.1 * len(box) and (box[:, 2:] > box[:, :2]).all():
            text = "boxes that look like left, top, right, bottom; COCO's are x, y, width, height"
            findings += if_any(FAULT, source, text, np.flatnonzero(readable), split.describe)
    return findings


def repeated(split: Split) -> np.ndarray:
    """Which annotations equal an earlier one in image, category and box, bool (n,)."""
    rows = np.column_stack((split.image_of, split.category_of, split.boxes))  # (n, 6); NaN equals nothing
    order = np.lexsort(rows.T)  # stable: equal rows stay in the order of the file
    repeats = np.zeros(len(rows), dtype=bool)
    repeats[order[1:]] = (rows[order[1:]] == rows[order[:-1]]).all(axis=1)
    return repeats & ~split.crowd


def check_counts(split: Split, num_queries: int) -> list[Finding]:
    """Too many objects, or none: by image, by category, and on the whole."""
    source = split.name
    if split.annotations and not split.readable.any():
        return []  # other findings say why
    ignored = [i for i, a in enumerate(split.annotations) if is_set(a.get("ignore")) and not is_set(a.get("iscrowd"))]
    findings = if_any(NOTE, source, 'annotations with "ignore": 1: they count as crowds', ignored, split.describe)
    if not split.objects.any():
        text = "no boxes to learn from" if source == "train" else "no boxes: COCO's figures will all be -1"
        return [*findings, Finding(ERROR if source == "train" else WARNING, source, text, 1)]
        text = "no boxes to learn from" if source == "train" else NOTHING_TO_MEASURE
        return [*findings, Finding(ERROR if source == "train" else WARNING, source, text, 1)]
    objects = np.bincount(split.image_of[split.objects], minlength=len(split.images))
    many = np.flatnonzero(objects > num_queries)
    text = f"images with more objects than the model has queries ({num_queries}): the rest cannot be found"
    findings += if_any(WARNING, source, text, many, lambda i: f"{split.images[i]['file_name']}: {objects[i]}")
    empty = np.flatnonzero(objects == 0)
    findings += if_any(
        WARNING if len(empty) > len(objects) / 2 else NOTE, source, "images without objects",
        empty, lambda i: split.images[i]["file_name"],
    )  # fmt: skip
    uses = np.bincount(split.category_of[split.objects], minlength=len(split.categories))
    findings += if_any(
        WARNING if source == "train" else NOTE, source, "categories without objects",
        np.flatnonzero(uses == 0), lambda i: shorten(split.categories[i]["name"]),
    )  # fmt: skip
    text = "crowds: not trained on, and neither right nor wrong in evaluation"
    findings += if_any(NOTE, source, text, np.flatnonzero(split.crowd), split.describe)
    difficult = [i for i, annotation in enumerate(split.annotations) if is_set(annotation.get("difficult"))]
    text = "annotations marked as difficult: --remove_difficult treats them as crowds"
    findings += if_any(NOTE, source, text, difficult, split.describe)
    return findings


def check_masks(split: Split) -> list[Finding]:
    """Segmentations that a training with --masks refuses; nothing where there are none at all."""
    given = [annotation.get("segmentation") for annotation in split.annotations]
    if not any(given):
        return []
    sizes: list[list[int] | None] = []
    for image in split.images:
        try:
            sizes.append(normalize_size(image.get("height"), image.get("width")))
        except ValueError:
            sizes.append(None)
    unsized = [split.images[i]["file_name"] for i, size in enumerate(sizes) if size is None]
    rows = [i for i, place in enumerate(split.image_of) if place >= 0 and sizes[place]]
    absent = [i for i in rows if not given[i]]
    rows = [i for i in rows if given[i]]
    read = normalize_all([given[i] for i in rows], [sizes[split.image_of[i]] for i in rows])
    damaged = [(i, words) for i, words in zip(rows, read, strict=True) if isinstance(words, str)]

    def describe(i: int, words: str = "") -> str:
        name = split.images[split.image_of[i]]["file_name"]
        return f"annotation {split.annotations[i].get('id')} in {name}{words and ' ' + words}"

    source = split.name
    return [
        *if_any(FAULT, source, "segmentations that --masks refuses", damaged, lambda case: describe(*case)),
        *if_any(WARNING, source, "annotations without a segmentation, which --masks refuses", absent, describe),
        *if_any(WARNING, source, "images without a height and width for --masks: whole numbers above 0", unsized),
    ]


def check_files(split: Split) -> list[Finding]:
    """Image files that are missing or not listed."""
    if not split.folder.is_dir():
        return [Finding(ERROR, split.name, f"the image folder {split.folder} is missing", 1)]
    paths = [split.path(image) for image in split.images]
    missing, present = missing_files(paths)
    listed = set(paths)
    there = (folder / name for folder, names in present.items() for name in names)
    suffixes = image_suffixes()
    there = (path for path in there if path.suffix.lower() in suffixes and not is_hidden(path.name))
    unlisted = sorted(str(path) for path in there if path not in listed)
    absent = set(missing)
    names = [image["file_name"] for image, path in zip(split.images, paths, strict=True) if path in absent]
    index = split.file_index() if names else []
    text = f"image files that are missing in {split.folder}"
    if any(hint(name, index) for name in names):
        text += f"; where another is there, {MEND.format(split.file.name)}"
    return [
        *if_any(ERROR, split.name, text, names, lambda name: f"{name[:200]}{hint(name, index)}"),
        *if_any(NOTE, split.name, "image files that the annotations do not list: not used", unlisted),
    ]


def check_images(split: Split, stored: Sequence[StoredImage | None]) -> list[Finding]:
    """Faults of the image files.

    Args:
        split: whose.
        stored: of each of its images, as `inspect_images` returns them.
    """
    unreadable, sizes, turned, by_digest = [], [], [], defaultdict(set)
    for image, said, file in zip(split.images, split.sizes, stored, strict=True):
        name = image["file_name"]
        if file is None:
            continue
        if file.error:
            unreadable.append(file.error)
            continue
        by_digest[file.digest].add(name)
        if file.orientation != 1:
            turned.append(f"{name}: {file.orientation}")
        if np.isfinite(said[0]) and tuple(said) != file.size:
            swapped = ", which fits once EXIF's rotation is applied" if tuple(said[::-1]) == file.size else ""
            swapped = swapped if file.orientation >= 5 else ""
            sizes.append("{}: {} x {}, annotated as {:g} x {:g}{}".format(name, *file.size, *said, swapped))
    twins = [" = ".join(sorted(names)) for names in by_digest.values() if len(names) > 1]
    source = split.name
    text = "images whose EXIF orientation is not upright: boxes must refer to the pixels as stored, which are used"
    return [
        *if_any(ERROR, source, "image files that cannot be read whole", unreadable),
        *if_any(FAULT, source, "images of another size than annotated (width x height)", sizes),
        *if_any(WARNING, source, text, turned),
        *if_any(WARNING, source, "images with the same pixels under several names", twins),
    ]


def compare_splits(
    train: Split,
    val: Split,
    stored: tuple[Sequence[StoredImage | None], Sequence[StoredImage | None]] | None = None,
    label_map: LabelMap | None = None,
) -> list[Finding]:
    """Leaks and mismatches between splits.

    Args:
        train: what is learned from.
        val: what is evaluated on.
        stored: what their images' files hold, for a comparison of the pixels; None compares names and file sizes.
        label_map: of the model, whose categories val may have; None for those of train.
    """
    source, findings = f"{train.name} and {val.name}", []
    own, other = ({c["id"]: str(c["name"]) for c in split.categories} for split in (train, val))
    if own and other:
        # COCO's labels are the same for all of its subsets.
        labels, owner = (
            label_map or LabelMap.from_categories(train.categories),
            "the model" if label_map else train.name,
        )
        known = {i: labels.names[label] for i, label in labels.labels().items()}
        unknown = [
            f"{i} {shorten(name)!r}" + (f", in {owner} {shorten(known[i])!r}" if i in known else "")
            for i, name in other.items()
            if known.get(i) != name
        ]
        findings += if_any(ERROR, source, f"categories that {val.name} has and {owner} has not", unknown)
        unseen = [f"{i} {shorten(name)!r}" for i, name in own.items() if i not in other]
        findings += if_any(WARNING, source, f"categories that {train.name} has and {val.name} has not", unseen)

    named = {image["file_name"]: train.path(image) for image in train.images}
    pairs = [(named[i["file_name"]], val.path(i)) for i in val.images if i["file_name"] in named]
    if stored is None:
        same = [str(theirs) for ours, theirs in pairs if file_size(ours) == file_size(theirs) is not None]
        text = "images of the same name and file size in both: evaluated on what was learned?"
        return findings + if_any(WARNING, source, text, same)
    learned: dict[bytes, str] = {}
    for image, file in zip(train.images, stored[0], strict=True):
        if file and not file.error:
            learned.setdefault(file.digest, image["file_name"])
    leaked = [
        f"{learned[file.digest]} = {image['file_name']}"
        for image, file in zip(val.images, stored[1], strict=True)
        if file and file.digest in learned
    ]
    findings += if_any(FAULT, source, "images with the same pixels in both: evaluated on what was learned", leaked)
    text = "image names that are in both, whatever the images"
    return findings + if_any(NOTE, source, text, [theirs.name for _, theirs in pairs])


def check_quickly(splits: Sequence[Split], num_queries: int, label_map: LabelMap | None = None) -> list[Finding]:
    """All that can be found without reading an image, the worst first within each split."""
    findings = []
    for split in splits:
        findings += by_severity(check_annotations(split, num_queries) + check_files(split))
    if len(splits) == 2:
        findings += by_severity(compare_splits(*splits, label_map=label_map))
    return findings


def check_fully(splits: Sequence[Split], num_queries: int, progress: bool = False) -> list[Finding]:
    """All that can be found, with every image decoded, the worst first within each split."""
    findings, stored = [], [inspect_images(split, progress) for split in splits]
    for split, files in zip(splits, stored, strict=True):
        own = check_annotations(split, num_queries) + check_files(split) + check_images(split, files)
        findings += by_severity(own)
    if len(splits) == 2:
        findings += by_severity(compare_splits(*splits, stored))
    return findings


def quick_checks(
    splits: Mapping[str, tuple[Path, Path]],
    num_queries: int,
    parsed: Mapping[str, dict] | None = None,
    label_map: LabelMap | None = None,
    limited: Collection[str] = (),
) -> list[Finding]:
    """What a training should know before it starts, without reading an image: seconds for the whole of COCO.

    Args:
        splits: under "train", "val" or "test" the image folder and the annotation file, as `find_split` returns them,
            what is trained on first. Of "test", only the images are checked.
        num_queries: of the model, which finds at most so many objects in an image.
        parsed: what is in those annotation files, for those that have been read already. Lists that were cut short
            (a limit on the images) are checked as they are.
        label_map: of the model, where it has one already: a checkpoint's, which may have categories that train has not.
        limited: the splits that `--limit_train` or `--limit_val` cut short.

    Returns:
        the faults and warnings that training goes on with; `str` of each is a line to log.

    Raises:
        UserError: it cannot go on: a file is missing or not JSON, there are no images, no categories or no boxes to
            learn from, annotations belong to nothing, or the splits' categories disagree.
    """
    parsed = parsed or {}
    read = [Split(name, *paths, parsed.get(name)) for name, paths in splits.items()]
    findings = check_quickly(read, num_queries, label_map)
    errors = [finding for finding in findings if finding.severity == ERROR]
    if errors:
        more = f"; and {len(errors) - 1} more kinds of errors" if len(errors) > 1 else ""
        first = errors[0].source
        where = ", ".join(str(file) for name, (_, file) in splits.items() if name == first or first not in splits)
        way_out = "; python -m enact_common.data.checks lists everything that is wrong"
        if first in limited:
            # It need not hold for the whole set, which the command checks.
            way_out = f", in the part that --limit_{'train' if first == 'train' else 'val'} leaves"
        raise UserError(f"{errors[0]}{more} [{where}]{way_out}")
    # Loading has logged which values it read as numbers.
    logged = {str(split.rewritten) for split in read}
    return [finding for finding in findings if finding.severity != NOTE and finding.text not in logged]
