"""COCO-format detection data: annotations checked and packed, items made, batches collated."""

import contextlib
import io
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from enact_common.data.categories import LabelMap
from enact_common.data.images import decode_bytes, decode_image
from enact_common.data.masks import PackedMasks, normalize_segmentations
from enact_common.data.names import hint, index_files, other_name
from enact_common.data.transforms import drop_degenerate
from enact_common.data.values import BOX_WANTED, is_area, is_box, is_crowd, is_id, is_set, normalise, shown, wrong_id
from enact_common.errors import UserError
from enact_common.nested_tensor import NestedTensor, nested_tensor_from_tensor_list

logger = logging.getLogger(__name__)

# Roboflow's exports in COCO's format have this file in each part's folder, beside the images.
ROBOFLOW_FILE = "_annotations.coco.json"
ROBOFLOW_FOLDERS = {"train": ("train",), "val": ("valid", "val"), "test": ("test",)}

LAYOUTS = (
    "known layouts: COCO's, <coco_path>/{split}2017 or <coco_path>/images/{split}2017 with <coco_path>/annotations/"
    "{file}; Roboflow's, <coco_path>/{roboflow}/" + ROBOFLOW_FILE + " with the images beside it; for any other, pass "
    "--train_images, --train_annotations, --val_images and --val_annotations"
)

# What becomes of an item whose image cannot be read: an error; another item in its place; None.
ON_UNREADABLE = ("raise", "replace", "leave out")

# Of an image: not tried yet, read, could not be read.
UNTRIED, READ, UNREADABLE = range(3)

# Unreadable images that make one suspect the whole data set, not them.
MANY = 8

# The test images have no annotations. COCO's server takes results on the smaller list, test-dev.
TEST_FILES = ("image_info_test-dev2017.json", "image_info_test2017.json")


def find_split(coco_path: str, split: str) -> tuple[Path, Path]:
    """The image folder and the annotation file of a split, in COCO's layout or in that of Roboflow's exports.

    COCO's layout has `{split}2017/`, or that folder in `images/`, and `annotations/instances_{split}2017.json`.
    Roboflow's has `train/`, `valid/` (or `val/`) and `test/`, each with `_annotations.coco.json` and the images.

    Args:
        coco_path: `--coco_path`.
        split: "train", "val" or "test".

    Raises:
        UserError: naming what is missing, or that the folder has parts of both layouts.
    """
    root = Path(coco_path)
    if not root.is_dir():
        raise UserError(f"--coco_path {coco_path}: no such folder")
    files = TEST_FILES if split == "test" else (f"instances_{split}2017.json",)
    candidates = [root / "annotations" / file for file in files]
    folders = [root / f"{split}2017", root / "images" / f"{split}2017"]
    layouts = LAYOUTS.format(split=split, file=" or ".join(files), roboflow=" or ".join(ROBOFLOW_FOLDERS[split]))

    exported = roboflow_files(root)
    if exported:
        coco = [path for path in coco_parts(root) if path.exists()]
        if coco:
            raise UserError(
                f"--coco_path {coco_path}: mixes two layouts, {coco[0]} and {exported[0]}; keep one of them in "
                f"this folder ({layouts})"
            )
        own = [path for path in exported if path.parent.name in ROBOFLOW_FOLDERS[split]]
        if len(own) > 1:
            raise UserError(f"--coco_path {coco_path}: {own[0]} and {own[1]} are both there; keep one of them")
        if not own:
            missing = root / ROBOFLOW_FOLDERS[split][0] / ROBOFLOW_FILE
            raise UserError(f"--coco_path {coco_path}: {missing} is missing ({layouts})")
        return own[0].parent, own[0]

    annotations = next((path for path in candidates if path.is_file()), None)
    images = next((folder for folder in folders if folder.is_dir()), None)
    if images is None or annotations is None:
        missing = candidates[0] if images else folders[0]
        raise UserError(f"--coco_path {coco_path}: {missing} is missing ({layouts})")
    return images, annotations


def roboflow_files(root: Path) -> list[Path]:
    """The annotation files of a Roboflow export in COCO's format; none where the folder is no such export."""
    places = [root / folder / ROBOFLOW_FILE for folders in ROBOFLOW_FOLDERS.values() for folder in folders]
    return [path for path in places if path.is_file()]


def coco_parts(root: Path) -> list[Path]:
    """The annotation files of COCO's layout, whether they are there or not."""
    names = (*(f"instances_{split}2017.json" for split in ("train", "val")), *TEST_FILES)
    return [root / "annotations" / name for name in names]


def read_json(path: Path) -> dict:
    """A JSON file's object.

    Raises:
        UserError: the file is missing, is not JSON, or holds something else.
    """
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a COCO annotation file: it holds a {type(data).__name__}, not an object")
    return data


def lies_in(folder: Path, name: str) -> bool:
    """Whether a name that a data file gives is that of something in a folder or below it.

    Absolute names may be, too. Names are all that is looked at: a symbolic link in the folder may lead anywhere.
    """
    if "\0" in name:
        return False
    base = os.path.join(os.path.abspath(folder), "")
    place = os.path.abspath(os.path.join(base, name))
    # An empty name is the folder itself.
    return place.startswith(base) and place != base


def check_file_names(images: Iterable[dict], folder: Path, source: Path) -> None:
    """Refuse image files outside the image folder: who hands on an annotation file must not choose what is read.

    Args:
        images: entries of `images`.
        folder: that their names refer to.
        source: the annotation file, for the message.

    Raises:
        UserError: naming the first that is not in the folder or below it, by its name, and the file in the folder that
            it may mean.
    """
    for image in images:
        name = image["file_name"]
        if not lies_in(folder, name):
            there = hint(name, index_files(folder))
            raise UserError(
                f"{source}: image {image['id']} has the file_name {name[:200]!r}, which is no file in {folder} or "
                f"below it{there}; correct the name, or name the folder above all the images as the image folder; "
                "python -m enact_common.data.checks names all such files, and what is there instead"
            )


def stated_size(image: dict) -> tuple[float, float]:
    """Width and height in pixels that an entry of `images` states, as numbers or as text; infinite where it does not.

    A file need not state them, so nothing but two finite numbers above 0 is taken for a size.
    """
    try:
        width, height = float(image["width"]), float(image["height"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return math.inf, math.inf
    return (width, height) if 0 < width < math.inf and 0 < height < math.inf else (math.inf, math.inf)


def missing_files(paths: Iterable[Path]) -> tuple[list[Path], dict[Path, set[str]]]:
    """Which files are not there, by one listing of each folder.

    Returns:
        the missing files, and of each file's folder the names in it, none where it cannot be listed.
    """
    missing, present = [], {}
    for path in paths:
        folder = path.parent
        if folder not in present:
            try:
                present[folder] = set(os.listdir(folder))
            except (OSError, ValueError):  # it is not there, or its name can be none
                present[folder] = set()
        if path.name not in present[folder]:
            missing.append(path)
    return missing, present


def load_lists(path: Path, lists: Sequence[str], log: bool = True) -> dict:
    """A file's object as `normalise` gives it, with the lists that it must have; `images`, `categories` are checked.

    Args:
        path: the file.
        lists: which it must have.
        log: say in one line which values had to be read as numbers.

    Raises:
        UserError: naming the file and the entry at fault.
    """
    original = read_json(path)
    for key in lists:
        if not isinstance(original.get(key), list):
            raise UserError(f"{path}: not a COCO annotation file, it has no list {key!r}")
    data, rewritten = normalise(original)
    if rewritten.counts and log:
        logger.warning("%s: %s", path, rewritten)
    for key, wanted in (("images", ("id", "file_name")), ("categories", ("id", "name"))):
        if not data[key]:
            raise UserError(f"{path}: the list {key!r} is empty")
        for entry in data[key]:
            if not isinstance(entry, dict) or any(name not in entry for name in wanted):
                if key == "images" and (other := other_name(entry)):
                    raise UserError(
                        f"{path}: an entry of 'images' has no file_name but a {other[0]}, {other[1][:200]!r}, as LVIS "
                        "has coco_url: write each file's path below the image folder into file_name"
                    )
                raise UserError(f"{path}: an entry of {key!r} lacks one of {', '.join(wanted)}: {str(entry)[:100]}")
            if not is_id(entry["id"]):
                raise UserError(f"{path}: an id in {key!r} is {wrong_id(entry['id'])}: {str(entry)[:100]}")
            if not isinstance(entry.get("file_name", ""), str):
                raise UserError(f"{path}: a file_name in {key!r} is no text: {str(entry)[:100]}")
        number, count = Counter(entry["id"] for entry in data[key]).most_common(1)[0]
        if count > 1:
            # They may be written in two ways, "1" and 1.
            both = zip(original[key], data[key], strict=True)
            written = dict.fromkeys(repr(old["id"]) for old, new in both if new["id"] == number)
            raise UserError(f"{path}: an id stands twice in {key!r}: {' and '.join(written)}")
    return data


def load_annotations(path: Path, annotated: bool = True, remove_difficult: bool = False, log: bool = True) -> dict:
    """A COCO-format annotation file, checked.

    Ids and numbers that are written as text, and ids written as floats, are read as `normalise` says. Annotations are
    numbered anew from 1: pycocotools takes an id of 0 for "not matched" and overlooks repeated ones, both without a
    word. What COCO's evaluation needs and some files lack or have as something else than numbers (`iscrowd`, `area`)
    is filled in. Annotations with `"ignore": 1` become crowds.

    Args:
        path: the file.
        annotated: False for a list of test images: it need not have `annotations`, and none are taken from it.
        remove_difficult: make crowds of the annotations with `"difficult": 1`, which converters write for those that
            Pascal VOC leaves out of training and of its figures.
        log: say which values had to be read as numbers and how many annotations are ignored; False where the file was
            read before.

    Returns:
        a dict with `images`, `annotations` and `categories`.

    Raises:
        UserError: naming the file and the entry at fault.
    """
    data = load_lists(path, ("images", "annotations", "categories") if annotated else ("images", "categories"), log)
    images = {image["id"] for image in data["images"]}
    categories = {category["id"] for category in data["categories"]}
    annotations, ignored = [], 0
    for number, annotation in enumerate(data["annotations"] if annotated else (), start=1):
        if not isinstance(annotation, dict):
            raise UserError(f"{path}: annotation {number} is no object: {str(annotation)[:100]}")
        where = f"{path}: annotation {annotation.get('id', number)}"
        for key, words, ids, name in (
            ("image_id", "belongs to image", images, "images"),
            ("category_id", "has category", categories, "categories"),
        ):
            value = annotation.get(key)
            if not is_id(value):
                raise UserError(f"{where} {words} {wrong_id(value)}, the id of an entry of {name!r}")
            if value not in ids:
                raise UserError(f"{where} {words} {value}, which is not in {name!r}")
        box = annotation.get("bbox")
        if not is_box(box):
            raise UserError(f"{where} has bbox {shown(box)}: {BOX_WANTED}")
        area, crowd = annotation.get("area"), is_crowd(annotation)
        ignored += crowd and not is_set(annotation.get("iscrowd"))
        # pycocotools computes with both, and ends a training at its first evaluation where they are no numbers.
        completed = {
            "iscrowd": int(crowd or (remove_difficult and is_set(annotation.get("difficult")))),
            "area": area if is_area(area) else max(box[2], 0) * max(box[3], 0),
        }
        annotations.append({**annotation, **completed, "id": number})
    if ignored and log:
        logger.warning('%s: %d annotations have "ignore": 1 and count as crowds, like "iscrowd": 1', path, ignored)
    return {"images": data["images"], "annotations": annotations, "categories": data["categories"]}


@contextlib.contextmanager
def seeded(*numbers: int):
    """Random numbers of PyTorch's CPU generator that depend on these numbers alone; its state is put back."""
    state = torch.get_rng_state()
    seed = np.random.SeedSequence(numbers).generate_state(1, dtype=np.uint64)[0]
    # Not torch.manual_seed, which would reseed the GPUs too.
    torch.default_generator.manual_seed(int(seed) >> 1)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class CocoDetection(Dataset):
    """Images with their boxes and labels.

    An item's augmentation depends on the seed, the epoch and the item alone, not on workers or on what was drawn
    before: a resumed run sees what an uninterrupted one would have seen.

    Crowd annotations are left out of the targets; boxes without area inside the image are dropped and counted.

    Which images could not be read is remembered, by all worker processes together, and they are not tried again. Which
    item takes the place of one depends on the seed, the epoch and the item alone, too.

    Args:
        image_folder: where the files are.
        annotation_file: COCO-format JSON.
        transforms: from (image, target) to the model's input.
        label_map: which label each category is; None for the one that the file's own categories make.
        num_classes: with label_map None, the labels to make room for.
        limit: keep the first so many images, in the order of their ids; None keeps all.
        seed: of the augmentation.
        annotated: False for a list of test images, whose targets have no boxes.
        remove_difficult: treat annotations marked as difficult as crowds.
        on_unreadable: one of `ON_UNREADABLE`.
        masks: targets have the objects' masks.

    Raises:
        UserError: the annotations are at fault, do not fit the label map or lead out of the image folder, or image
            files are missing.
    """

    def __init__(
        self,
        image_folder: Path,
        annotation_file: Path,
        transforms: Callable[[tv_tensors.Image, dict], tuple[Tensor, dict]],
        label_map: LabelMap | None = None,
        num_classes: int | None = None,
        limit: int | None = None,
        seed: int = 0,
        annotated: bool = True,
        remove_difficult: bool = False,
        on_unreadable: str = "raise",
        masks: bool = False,
    ):
        if on_unreadable not in ON_UNREADABLE:
            raise ValueError(f"on_unreadable must be one of {', '.join(ON_UNREADABLE)}, got {on_unreadable!r}")
        self.annotated = annotated
        self.on_unreadable = on_unreadable
        self.remove_difficult = remove_difficult
        self.with_masks = masks
        annotations = self.load(Path(annotation_file))
        if label_map is None:
            label_map = self.own_labels(annotations["categories"], num_classes)
        label_map.check_categories(annotations["categories"], str(annotation_file))
        self.image_folder = Path(image_folder)
        self.annotation_file = Path(annotation_file)
        check_file_names(annotations["images"], self.image_folder, self.annotation_file)
        self._masks: PackedMasks | None = None
        self.transforms = transforms
        self.label_map = label_map
        self.seed = seed
        # Shared, so that workers which live longer than an epoch see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

        images = sorted(annotations["images"], key=lambda image: image["id"])[:limit]
        objects = annotations["annotations"]
        if masks:
            images, objects = normalize_segmentations(images, objects, self.annotation_file)
        self.image_ids = [image["id"] for image in images]
        self.file_names = [image["file_name"] for image in images]
        self.check_files()
        self._cache: Sequence[Tensor] | None = None
        self._state = torch.full((len(self.image_ids),), UNTRIED, dtype=torch.uint8).share_memory_()
        # Files need not say how large their images are; boxes are clipped once more when an image is read.
        self.pack(objects, np.array([stated_size(image) for image in images]))

    def load(self, path: Path) -> dict:
        """`images`, `annotations` and `categories` of an annotation file, checked.

        Raises:
            UserError: naming the file and the entry at fault.
        """
        return load_annotations(path, self.annotated, self.remove_difficult)

    def own_labels(self, categories: list[dict], num_classes: int | None) -> LabelMap:
        """The labels that a file's own categories make.

        Raises:
            UserError: num_classes is too small.
        """
        return LabelMap.from_categories(categories, num_classes)

    def check_files(self) -> None:
        """Refuse a data set whose image files are not all there."""
        missing, _ = missing_files(self.path(i) for i in range(len(self)))
        if missing:
            absent = set(missing)
            name = next(name for i, name in enumerate(self.file_names) if self.path(i) in absent)
            taken = (name for i, name in enumerate(self.file_names) if self.path(i) not in absent)
            there = hint(name, index_files(self.image_folder, taken))
            raise UserError(
                f"{self.annotation_file}: {len(missing)} of its {len(self.file_names)} image files are missing, "
                f"{name[:200]!r} in {self.image_folder} first{there}; python -m enact_common.data.checks names them, "
                "and what is there instead"
            )

    def pack(self, annotations: list[dict], sizes: np.ndarray) -> None:
        """Keep boxes (xyxy) and labels as arrays: what every worker process holds, without a copy of the JSON.

        Args:
            annotations: of all images of the file.
            sizes: (images, 2), (width, height) in pixels, infinite where unknown.
        """
        index = {image_id: i for i, image_id in enumerate(self.image_ids)}
        labels = self.label_map.labels()
        annotations = [a for a in annotations if a["image_id"] in index and not a["iscrowd"]]
        rows = [(index[a["image_id"]], labels[a["category_id"]], *a["bbox"]) for a in annotations]
        table = np.array(rows, dtype=np.float64).reshape(-1, 6)  # image, label, x, y, width, height
        table[:, 4:] += table[:, 2:4]  # image, label, left, top, right, bottom
        size = sizes[table[:, 0].astype(np.int64)]
        table[:, 2:] = table[:, 2:].clip(0, np.tile(size, 2))
        whole = (table[:, 4:] > table[:, 2:4]).all(axis=1)
        if not whole.all():
            logger.warning("%s: %d boxes without area are dropped", self.annotation_file, (~whole).sum())
        kept = np.flatnonzero(whole)
        kept = kept[np.argsort(table[kept, 0], kind="stable")]
        table = table[kept]
        if self.with_masks:
            self._masks = PackedMasks([annotations[i]["segmentation"] for i in kept])
        self._first = np.searchsorted(table[:, 0], np.arange(len(self.image_ids) + 1))
        self._labels = torch.from_numpy(table[:, 1].astype(np.int64))
        self._boxes = torch.from_numpy(table[:, 2:].astype(np.float32))

    def set_epoch(self, epoch: int) -> None:
        """Let the augmentation of this epoch follow."""
        self._epoch.fill_(epoch)

    def path(self, index: int) -> Path:
        """An item's image file."""
        return self.image_folder / self.file_names[index]

    def set_cache(self, cache: Sequence[Tensor], failed: dict[int, UserError]) -> None:
        """Take the images from memory from now on.

        Args:
            cache: of each item its file, uint8 (bytes,), or its pixels, uint8 (3, height, width).
            failed: the items that could not be read, and why.

        Raises:
            UserError: most of them could not.
        """
        self._cache = cache
        self._state.fill_(READ)
        for index, error in failed.items():
            self.note_unreadable(index, error)

    def image(self, index: int) -> Tensor:
        """An item's image as it is stored, uint8 (3, height, width), from the disk or from the cache.

        Raises:
            UserError: it cannot be read.
        """
        path = self.path(index)
        if self._cache is None:
            return decode_image(path)
        cached = self._cache[index]
        # Pixels are copied: what is done to an item must not reach the cache, nor the whole cache be sent along with
        # an item that is a part of it.
        return cached.clone() if cached.ndim == 3 else decode_bytes(cached.numpy(), path)

    def item(self, index: int) -> tuple[tv_tensors.Image, dict]:
        """An item's image as it is stored, uint8 (3, height, width), and its target, before their transforms.

        Raises:
            UserError: it cannot be read.
        """
        image = tv_tensors.Image(self.image(index))
        height, width = image.shape[-2:]
        objects = slice(self._first[index], self._first[index + 1])
        boxes = tv_tensors.BoundingBoxes(self._boxes[objects].clone(), format="XYXY", canvas_size=(height, width))
        target = {
            "image_id": torch.tensor([self.image_ids[index]]),
            "orig_size": torch.tensor([height, width]),
            "boxes": boxes,
            "labels": self._labels[objects],
        }
        if self._masks is not None:
            masks = self._masks.decode(objects, height, width, str(self.path(index)))
            target["masks"] = tv_tensors.Mask(masks)
        return image, drop_degenerate(target)

    def item_or_none(self, index: int) -> tuple[tv_tensors.Image, dict] | None:
        """`item`; None where it cannot be read and that is no error here.

        Raises:
            UserError: it cannot be read, and `on_unreadable` is "raise", or most images that were tried cannot be.
        """
        if self.on_unreadable == "raise":
            return self.item(index)
        if self._state[index] == UNREADABLE:
            return None
        try:
            item = self.item(index)
        except UserError as error:
            self.note_unreadable(index, error)
            return None
        self._state[index] = READ
        return item

    def note_unreadable(self, index: int, error: UserError) -> None:
        """Let an item's image not be tried any more.

        Args:
            index: the item.
            error: why.

        Raises:
            UserError: most images that were tried cannot be read, and they are many, or most of all.
        """
        self._state[index] = UNREADABLE
        tried, bad = int((self._state != UNTRIED).sum()), int((self._state == UNREADABLE).sum())
        if 2 * bad > tried and (bad >= MANY or 2 * bad > len(self)):
            raise UserError(
                f"{self.image_folder}: {bad} of {tried} images that were tried cannot be read, the last one being "
                f"{error}; python -m enact_common.data.checks names them all"
            ) from error

    def unreadable(self) -> list[int]:
        """The items whose images could not be read so far."""
        return (self._state == UNREADABLE).nonzero().flatten().tolist()

    def why_unreadable(self, index: int) -> str:
        """In words that begin with the file, why an item's image cannot be read."""
        try:
            decode_image(self.path(index))
        except UserError as error:
            return str(error)
        return f"{self.path(index)}: could not be read, though it can be now"

    @property
    def num_objects(self) -> int:
        """Boxes in all targets together."""
        return len(self._labels)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]] | None:
        """One image, as `transforms` leaves it (with ours uint8 (3, h, w)), and its target.

        The target has `image_id` int64 (1,); `orig_size` and `size` int64 (2,), (height, width) in pixels as stored
        and as given; `labels` int64 (n,) and `boxes` float32 (n, 4) cxcywh in [0, 1]; with masks, `masks` bool
        (n, h, w).

        Of an image that cannot be read, what `on_unreadable` says.

        Raises:
            UserError: as `item_or_none`.
        """
        item, attempts = self.item_or_none(index), 0
        while item is None:
            if self.on_unreadable == "leave out":
                return None
            # Ends at the latest when most images were found unreadable.
            attempts += 1
            with seeded(self.seed, int(self._epoch), index, attempts):
                index = int(torch.randint(len(self), ()))
            item = self.item_or_none(index)
        with seeded(self.seed, int(self._epoch), index):
            return self.transforms(*item)

    def coco_api(self) -> COCO:
        """The ground truth of these images as pycocotools has it, crowds included; without masks, no `segmentation`."""
        # The log has said it when the data set was made.
        data = load_annotations(self.annotation_file, self.annotated, self.remove_difficult, log=False)
        kept = set(self.image_ids)
        images = [image for image in data["images"] if image["id"] in kept]
        annotations = [a for a in data["annotations"] if a["image_id"] in kept]
        if self.with_masks:
            images, annotations = normalize_segmentations(images, annotations, self.annotation_file)
        else:
            # Unchecked ones must not reach pycocotools' C code.
            annotations = [{key: a[key] for key in a if key != "segmentation"} for a in annotations]
        coco = COCO()
        coco.dataset = {
            # pycocotools copies both into its results; a file need not have them.
            "info": {},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": data["categories"],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco


def collate(
    items: list[tuple[Tensor, dict[str, Tensor]] | None],
) -> tuple[NestedTensor, list[dict[str, Tensor]]] | None:
    """A padded batch of images, uint8 where `to_model_input` ended their transforms, and the list of their targets.

    Items that are None are left out; None where that leaves nothing.
    """
    items = [item for item in items if item is not None]
    if not items:
        return None
    images, targets = zip(*items, strict=True)
    return nested_tensor_from_tensor_list(list(images)), list(targets)
