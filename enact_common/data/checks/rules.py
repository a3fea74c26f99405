"""The rules of the data checks. Each finding is one kind of fault with its first cases."""

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

# Training replaces this finding with its own message.
NOTHING_TO_MEASURE = "no boxes: all COCO metrics will be -1"

# Annotation tools round boxes past the image's edge by up to this many pixels.
EDGE_SLACK = 1.0

FIX_NAME = "write its path below that folder, with slashes, as file_name into {}"


def check_annotations(split: Split, num_queries: int) -> list[Finding]:
    """Faults in a split's annotation file, for a model that finds at most `num_queries` objects in an image."""
    findings = check_entries(split)
    if split.name != "test" and "annotations" not in split.missing:
        findings += check_ids(split) + check_boxes(split) + check_counts(split, num_queries)
        findings += check_masks(split)
    return findings


def check_entries(split: Split) -> list[Finding]:
    """Missing or empty lists, incomplete entries, and duplicate ids and names."""
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
            elif key != "images" or not other_name(entry):  # `check_names` reports these
                lacking.append(entry)
        text = f"invalid ids in {key!r}: {ID_WANTED}"
        findings += if_any(ERROR, source, text, wrong, lambda entry: f"{shown(entry['id'])} in {shorten(entry)}")
        findings += if_any(ERROR, source, f"entries of {key!r} without {needs}", lacking, shorten)
        if key == "annotations":
            continue
        if not (entries or malformed or key in split.missing or (key == "images" and split.outside)):
            findings.append(Finding(ERROR, source, f"the list {key!r} is empty: nothing to learn", 1))
        twice = [i for i, count in Counter(entry["id"] for entry in entries).items() if count > 1]
        findings += if_any(ERROR, source, f"duplicate ids in {key!r}", twice)

    findings += check_names(split)
    files = Counter(image["file_name"] for image in split.images)
    twice = [name for name, count in files.items() if count > 1]
    text = "image files listed under two ids: their boxes are split, or the images count twice"
    findings += if_any(FAULT, source, text, twice)
    names = Counter(str(category["name"]) for category in split.categories)
    twice = [name for name, count in names.items() if count > 1]
    findings += if_any(WARNING, source, "names that two categories share", twice, repr)

    def stated(i: int) -> str:
        width, height = (shorten(split.images[i].get(side, "?")) for side in ("width", "height"))
        return f"{split.images[i]['file_name']}: {width} x {height}"

    text = "images without width and height above 0: cannot check whether boxes lie inside"
    return findings + if_any(WARNING, source, text, np.flatnonzero(np.isinf(split.sizes[:, 0])), stated)


def check_names(split: Split) -> list[Finding]:
    """Images without a file_name, or with one that leads out of the folder, and the file that each may mean."""
    nameless = [(image, *other) for image in split.malformed["images"] if (other := other_name(image))]
    if not (nameless or split.outside):
        return []
    index, listing = split.file_index(), split.file.name
    text = (
        f"images without a file_name but with another field that names the file, such as LVIS's coco_url: write the "
        f"file's path below {split.folder} as file_name into {listing}"
    )
    outside = f"images whose file_name is not a file below {split.folder}: {FIX_NAME.format(listing)}"

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
    """Annotation ids that pycocotools mishandles. This project's loader renumbers annotations."""
    source, ids = split.name, [annotation.get("id") for annotation in split.annotations]
    renumbered = "this project renumbers them"
    whole = [i for i in ids if is_integer(i)]
    others = [repr(i) for i in ids if not is_integer(i)] if len(whole) < len(ids) else []
    counts = Counter(whole) if len(set(whole)) < len(whole) else {}
    twice = [f"id {i}, {count} times" for i, count in counts.items() if count > 1]
    return [
        *if_any(WARNING, source, f"annotations without an integer id: pycocotools fails; {renumbered}", others),
        *if_any(WARNING, source, f"duplicate annotation ids: pycocotools reports an AP near 0; {renumbered}", twice),
        *if_any(
            WARNING, source, f"annotations with id 0: pycocotools never counts them as found; {renumbered}",
            [i for i, number in enumerate(ids) if is_integer(number) and number == 0], split.describe,
        ),
    ]  # fmt: skip


def check_boxes(split: Split) -> list[Finding]:
    """Annotations of unknown images or categories, and invalid boxes, areas and marks."""
    source, boxes = split.name, split.boxes
    readable, positive = ~np.isnan(boxes[:, 0]), (boxes[:, 2:] > 0).all(axis=1)
    corners, clipped = split.edges
    inside = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
    beyond = readable & positive & inside & (np.abs(corners - clipped) > EDGE_SLACK).any(axis=1)

    def reference(key: str) -> Callable[[int], str]:
        word = key.removesuffix("_id")
        return lambda i: f"annotation {split.annotations[i].get('id')}: {word} {shown(split.annotations[i].get(key))}"

    def references(key: str, entries: str) -> tuple[np.ndarray, np.ndarray]:
        """Which annotations have no valid id under `key`, and which have an unlisted id; bool (n,) each."""
        ids, known = [a.get(key) for a in split.annotations], split.known_ids(entries)
        usable = np.array([is_id(i) for i in ids], dtype=bool)
        unknown = [is_id(i) and i not in known for i in ids]
        return ~usable, np.array(unknown, dtype=bool)

    def stated(key: str) -> Callable[[int], str]:
        return lambda i: f"annotation {split.annotations[i].get('id')}: {shorten(repr(split.annotations[i][key]))}"

    def invalid(key: str, usable: Callable[[Any], bool]) -> np.ndarray:
        return np.array([key in a and not usable(a[key]) for a in split.annotations], dtype=bool)

    def invalid_mark(key: str) -> tuple[str, str, np.ndarray, Callable[[int], str]]:
        text = f"values of {key} other than 0 and 1: read as 0"
        return WARNING, text, invalid(key, lambda value: as_mark(value) is not None), stated(key)

    no_image, other_image = references("image_id", "images")
    no_category, other_category = references("category_id", "categories")
    findings = []
    for severity, text, which, describe in (
        (ERROR, f"annotations with an invalid image_id: {ID_WANTED}", no_image, reference("image_id")),
        (ERROR, f"annotations with an invalid category_id: {ID_WANTED}", no_category, reference("category_id")),
        (ERROR, "annotations of images that are not listed", other_image, reference("image_id")),
        (ERROR, "annotations of categories that are not listed", other_category, reference("category_id")),
        (ERROR, f"invalid boxes: {BOX_WANTED}", ~readable, split.describe),
        (FAULT, "boxes without width or height: dropped", readable & ~positive, split.describe),
        (FAULT, "boxes entirely outside their image: dropped", readable & positive & ~inside, split.describe),
        (WARNING, "boxes that extend past the image's edge by more than a pixel: clipped", beyond, split.describe),
        (WARNING, "duplicates of another box of the same class in the image", repeated(split), split.describe),
        (WARNING, "areas that are not numbers >= 0: the box's is used", invalid("area", is_area), stated("area")),
        invalid_mark("iscrowd"),
        invalid_mark("ignore"),
    ):
        findings += if_any(severity, source, text, np.flatnonzero(which), describe)

    if readable.any():
        box = boxes[readable]
        if (np.abs(box) <= 1).all():
            text = "all boxes lie within 0 and 1 and look like fractions of the image; COCO's are in pixels"
            findings += if_any(FAULT, source, text, np.flatnonzero(readable), split.describe)
        if beyond.sum() > 0.1 * len(box) and (box[:, 2:] > box[:, :2]).all():
            text = "boxes that look like left, top, right, bottom; COCO's are x, y, width, height"
            findings += if_any(FAULT, source, text, np.flatnonzero(readable), split.describe)
    return findings


def repeated(split: Split) -> np.ndarray:
    """Which annotations have the image, category and box of an earlier annotation, bool (n,)."""
    rows = np.column_stack((split.image_of, split.category_of, split.boxes))  # (n, 6); NaN equals nothing
    order = np.lexsort(rows.T)  # stable: equal rows stay in the order of the file
    repeats = np.zeros(len(rows), dtype=bool)
    repeats[order[1:]] = (rows[order[1:]] == rows[order[:-1]]).all(axis=1)
    return repeats & ~split.crowd


def check_counts(split: Split, num_queries: int) -> list[Finding]:
    """Too many objects, or none, by image, by category and in total; crowds and difficult objects."""
    source = split.name
    if split.annotations and not split.readable.any():
        return []  # other findings explain why
    ignored = [i for i, a in enumerate(split.annotations) if is_set(a.get("ignore")) and not is_set(a.get("iscrowd"))]
    findings = if_any(NOTE, source, 'annotations with "ignore": 1: they count as crowds', ignored, split.describe)
    if not split.objects.any():
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
    text = "crowds: not trained on and ignored in evaluation"
    findings += if_any(NOTE, source, text, np.flatnonzero(split.crowd), split.describe)
    difficult = [i for i, annotation in enumerate(split.annotations) if is_set(annotation.get("difficult"))]
    text = "annotations marked as difficult: --remove_difficult treats them as crowds"
    findings += if_any(NOTE, source, text, difficult, split.describe)
    return findings


def check_masks(split: Split) -> list[Finding]:
    """Segmentations that training with --masks refuses; empty if the split has no segmentations."""
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
    rows = [i for i, image in enumerate(split.image_of) if image >= 0 and sizes[image]]
    absent = [i for i in rows if not given[i]]
    rows = [i for i in rows if given[i]]
    read = normalize_all([given[i] for i in rows], [sizes[split.image_of[i]] for i in rows])
    damaged = [(i, reason) for i, reason in zip(rows, read, strict=True) if isinstance(reason, str)]

    def describe(i: int, reason: str = "") -> str:
        name = split.images[split.image_of[i]]["file_name"]
        return f"annotation {split.annotations[i].get('id')} in {name}{reason and ' ' + reason}"

    source = split.name
    return [
        *if_any(FAULT, source, "segmentations that --masks refuses", damaged, lambda case: describe(*case)),
        *if_any(WARNING, source, "annotations without a segmentation, which --masks refuses", absent, describe),
        *if_any(WARNING, source, "images without the height and width that --masks needs: integers above 0", unsized),
    ]


def check_files(split: Split) -> list[Finding]:
    """Missing image files and unlisted image files."""
    if not split.folder.is_dir():
        return [Finding(ERROR, split.name, f"the image folder {split.folder} is missing", 1)]
    paths = [split.path(image) for image in split.images]
    missing, present = missing_files(paths)
    listed = set(paths)
    existing = (folder / name for folder, names in present.items() for name in names)
    suffixes = image_suffixes()
    existing = (path for path in existing if path.suffix.lower() in suffixes and not is_hidden(path.name))
    unlisted = sorted(str(path) for path in existing if path not in listed)
    absent = set(missing)
    names = [image["file_name"] for image, path in zip(split.images, paths, strict=True) if path in absent]
    index = split.file_index() if names else []
    text = f"missing image files in {split.folder}"
    if any(hint(name, index) for name in names):
        text += f"; if the file has another name, {FIX_NAME.format(split.file.name)}"
    return [
        *if_any(ERROR, split.name, text, names, lambda name: f"{name[:200]}{hint(name, index)}"),
        *if_any(NOTE, split.name, "image files that the annotations do not list: not used", unlisted),
    ]


def check_images(split: Split, stored: Sequence[StoredImage | None]) -> list[Finding]:
    """Faults in the image files, from their properties by `inspect_images`."""
    unreadable, sizes, turned, by_digest = [], [], [], defaultdict(set)
    for image, size, file in zip(split.images, split.sizes, stored, strict=True):
        name = image["file_name"]
        if file is None:
            continue
        if file.error:
            unreadable.append(file.error)
            continue
        by_digest[file.digest].add(name)
        if file.orientation != 1:
            turned.append(f"{name}: {file.orientation}")
        if np.isfinite(size[0]) and tuple(size) != file.size:
            swapped = ", which matches after EXIF rotation" if tuple(size[::-1]) == file.size else ""
            swapped = swapped if file.orientation >= 5 else ""
            sizes.append("{}: {} x {}, annotated as {:g} x {:g}{}".format(name, *file.size, *size, swapped))
    twins = [" = ".join(sorted(names)) for names in by_digest.values() if len(names) > 1]
    source = split.name
    text = "images whose EXIF orientation is not upright: it is not applied, boxes must refer to the stored pixels"
    return [
        *if_any(ERROR, source, "unreadable or damaged image files", unreadable),
        *if_any(FAULT, source, "images whose size differs from the annotated size (width x height)", sizes),
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
        train, val: the splits.
        stored: the properties of both splits' image files, to compare pixels; None compares names and file sizes.
        label_map: the model's labels, whose categories val may have; None allows only train's categories.
    """
    source, findings = f"{train.name} and {val.name}", []
    own, other = ({c["id"]: str(c["name"]) for c in split.categories} for split in (train, val))
    if own and other:
        # All subsets of COCO's categories have the same labels.
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
        findings += if_any(ERROR, source, f"categories in {val.name} that {owner} lacks", unknown)
        unseen = [f"{i} {shorten(name)!r}" for i, name in own.items() if i not in other]
        findings += if_any(WARNING, source, f"categories in {train.name} that {val.name} lacks", unseen)

    named = {image["file_name"]: train.path(image) for image in train.images}
    pairs = [(named[i["file_name"]], val.path(i)) for i in val.images if i["file_name"] in named]
    if stored is None:
        same = [str(theirs) for ours, theirs in pairs if file_size(ours) == file_size(theirs) is not None]
        text = "images with the same name and file size in both: training may leak into evaluation"
        return findings + if_any(WARNING, source, text, same)
    train_names: dict[bytes, str] = {}
    for image, file in zip(train.images, stored[0], strict=True):
        if file and not file.error:
            train_names.setdefault(file.digest, image["file_name"])
    leaked = [
        f"{train_names[file.digest]} = {image['file_name']}"
        for image, file in zip(val.images, stored[1], strict=True)
        if file and file.digest in train_names
    ]
    findings += if_any(FAULT, source, "images with the same pixels in both: training leaks into evaluation", leaked)
    text = "image names in both, whatever their pixels"
    return findings + if_any(NOTE, source, text, [theirs.name for _, theirs in pairs])


def check_quickly(splits: Sequence[Split], num_queries: int, label_map: LabelMap | None = None) -> list[Finding]:
    """All findings that need no image, sorted from worst to mildest within each split."""
    findings = []
    for split in splits:
        findings += by_severity(check_annotations(split, num_queries) + check_files(split))
    if len(splits) == 2:
        findings += by_severity(compare_splits(*splits, label_map=label_map))
    return findings


def check_fully(splits: Sequence[Split], num_queries: int, progress: bool = False) -> list[Finding]:
    """All findings, sorted from worst to mildest within each split; decodes every image."""
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
    """Check data before training without reading an image, in seconds for all of COCO.

    Args:
        splits: the image folder and annotation file of each split "train", "val" or "test", the training split first.
            For "test", only the images are checked.
        num_queries: the most objects that the model finds in an image.
        parsed: the contents of annotation files that have been read already, possibly shortened by a limit on the
            images.
        label_map: the labels of a checkpoint, which may have categories that train lacks; None without a checkpoint.
        limited: the splits that `--limit_train` or `--limit_val` shortens.

    Returns:
        the faults and warnings that do not stop training; `str` of each is a line to log.

    Raises:
        UserError: training cannot start: a file is missing or not JSON, there are no images, no categories or no boxes
            to learn from, annotations refer to unlisted images or categories, or the splits' categories disagree.
    """
    parsed = parsed or {}
    read = [Split(name, *paths, parsed.get(name)) for name, paths in splits.items()]
    findings = check_quickly(read, num_queries, label_map)
    errors = [finding for finding in findings if finding.severity == ERROR]
    if errors:
        more = f"; and {len(errors) - 1} more kinds of errors" if len(errors) > 1 else ""
        first = errors[0].source
        where = ", ".join(str(file) for name, (_, file) in splits.items() if name == first or first not in splits)
        way_out = "; python -m enact_common.data.checks lists all faults"
        if first in limited:
            # The command checks the whole set, where the fault may be absent.
            way_out = f", among the images that --limit_{'train' if first == 'train' else 'val'} keeps"
        raise UserError(f"{errors[0]}{more} [{where}]{way_out}")
    # Loading has already logged which values it converted to numbers.
    logged = {str(split.rewritten) for split in read}
    return [finding for finding in findings if finding.severity != NOTE and finding.text not in logged]
