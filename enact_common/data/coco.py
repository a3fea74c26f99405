"""COCO-format detection data sets and their batches."""

import contextlib
import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from enact_common.data.annotations import check_file_names, load_annotations, missing_files, stated_size
from enact_common.data.categories import LabelMap
from enact_common.data.images import decode_bytes, decode_image
from enact_common.data.masks import PackedMasks, normalize_segmentations
from enact_common.data.names import hint, index_files
from enact_common.data.transforms import drop_degenerate
from enact_common.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from enact_common.utils.errors import UserError

logger = logging.getLogger(__name__)

# For an item with an unreadable image: raise an error, return another item, or return None.
ON_UNREADABLE = ("raise", "replace", "leave out")

# States of an image.
UNTRIED, READ, UNREADABLE = range(3)

# From this many unreadable images on, the data set itself may be at fault.
MANY = 8


@contextlib.contextmanager
def seeded(*numbers: int):
    """Seed PyTorch's CPU generator from these numbers within the block; its state is restored afterwards."""
    state = torch.get_rng_state()
    seed = np.random.SeedSequence(numbers).generate_state(1, dtype=np.uint64)[0]
    # torch.manual_seed would also reseed the GPUs.
    torch.default_generator.manual_seed(int(seed) >> 1)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class CocoDetection(Dataset):
    """A data set of images with boxes and labels, and optionally masks.

    An item's augmentation depends only on the seed, the epoch and the item. Workers and earlier random draws do not
    matter, so a resumed run sees the same items as an uninterrupted run.

    Targets have no crowd annotations; boxes without area inside the image are dropped and counted.

    Worker processes share a record of unreadable images and do not retry them. The item that replaces an unreadable one
    also depends only on the seed, the epoch and the item.

    Args:
        image_folder: folder of the image files.
        annotation_file: COCO-format JSON.
        transforms: maps (image, target) to the model's input.
        label_map: the label of each category; None derives it from the file's categories.
        num_classes: number of labels if label_map is None; None for as many as needed.
        limit: keep only this many images, in the order of their ids; None keeps all.
        seed: seed of the augmentation.
        annotated: False for a list of test images, whose targets have no boxes.
        remove_difficult: treat annotations marked as difficult as crowds.
        on_unreadable: one of `ON_UNREADABLE`.
        masks: include the objects' masks in the targets.

    Raises:
        UserError: the annotations are invalid, do not fit the label map or lead out of the image folder, or image
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
        # Shared, because persistent workers must see it change.
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
        # Annotation files may omit image sizes, so boxes are clipped again when an image is read.
        self.sizes = np.array([stated_size(image) for image in images])  # (images, 2): width, height
        self.pack(objects, self.sizes)

    def load(self, path: Path) -> dict:
        """Return the checked `images`, `annotations` and `categories` of an annotation file, or raise a UserError."""
        return load_annotations(path, self.annotated, self.remove_difficult)

    def own_labels(self, categories: list[dict], num_classes: int | None) -> LabelMap:
        """The label map derived from a file's categories."""
        return LabelMap.from_categories(categories, num_classes)

    def check_files(self) -> None:
        """Refuse a data set with missing image files."""
        missing, _ = missing_files(self.path(i) for i in range(len(self)))
        if missing:
            absent = set(missing)
            name = next(name for i, name in enumerate(self.file_names) if self.path(i) in absent)
            taken = (name for i, name in enumerate(self.file_names) if self.path(i) not in absent)
            there = hint(name, index_files(self.image_folder, taken))
            raise UserError(
                f"{self.annotation_file}: {len(missing)} of its {len(self.file_names)} image files are missing, "
                f"{name[:200]!r} in {self.image_folder} first{there}; python -m enact_common.data.checks lists them "
                "and the files they may mean"
            )

    def pack(self, annotations: list[dict], sizes: np.ndarray) -> None:
        """Store boxes (xyxy) and labels as arrays, which take less memory per worker process than the JSON.

        Args:
            annotations: annotations of all images of the file.
            sizes: (images, 2), (width, height) in pixels, infinite if unknown.
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

    @property
    def most_objects(self) -> int:
        """The most objects in an image, without crowds."""
        return int(np.diff(self._first).max(initial=0))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the augmentation depends on."""
        self._epoch.fill_(epoch)

    def path(self, index: int) -> Path:
        """The path of an item's image file."""
        return self.image_folder / self.file_names[index]

    def set_cache(self, cache: Sequence[Tensor], failed: dict[int, UserError]) -> None:
        """Read images from memory from now on.

        Args:
            cache: each item's file, uint8 (bytes,), or its pixels, uint8 (3, height, width).
            failed: the unreadable items and the reasons.

        Raises:
            UserError: most items are unreadable.
        """
        self._cache = cache
        self._state.fill_(READ)
        for index, error in failed.items():
            self.note_unreadable(index, error)

    def image(self, index: int) -> Tensor:
        """The stored image of an item, uint8 (3, height, width), from the disk or the cache, or a UserError."""
        path = self.path(index)
        if self._cache is None:
            return decode_image(path)
        cached = self._cache[index]
        # Copy pixels: a change of an item must not reach the cache, and sending a view would send the whole cache.
        return cached.clone() if cached.ndim == 3 else decode_bytes(cached.numpy(), path)

    def item(self, index: int) -> tuple[tv_tensors.Image, dict]:
        """The stored image of an item, uint8 (3, height, width), and its target, before the transforms.

        Raises:
            UserError: the image or a mask cannot be read.
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
        """Return `item`, or None if it cannot be read and `on_unreadable` tolerates that."""
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
        """Mark an item's image as unreadable, so that it is not retried.

        Raises:
            UserError: most tried images are unreadable, and these are at least `MANY` or most of the data set.
        """
        self._state[index] = UNREADABLE
        tried, bad = int((self._state != UNTRIED).sum()), int((self._state == UNREADABLE).sum())
        if 2 * bad > tried and (bad >= MANY or 2 * bad > len(self)):
            raise UserError(
                f"{self.image_folder}: {bad} of {tried} images tried cannot be read, most recently "
                f"{error}; python -m enact_common.data.checks lists all of them"
            ) from error

    def unreadable(self) -> list[int]:
        """The items marked unreadable so far."""
        return (self._state == UNREADABLE).nonzero().flatten().tolist()

    def why_unreadable(self, index: int) -> str:
        """Why an item's image cannot be read, as text that starts with the file."""
        try:
            decode_image(self.path(index))
        except UserError as error:
            return str(error)
        return f"{self.path(index)}: could not be read earlier, but can be read now"

    @property
    def num_objects(self) -> int:
        """The number of boxes in all targets."""
        return len(self._labels)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]] | None:
        """The transformed image, with our transforms uint8 (3, h, w), and its target.

        The target has `image_id` int64 (1,); `orig_size` and `size` int64 (2,), (height, width) in pixels as stored and
        after the transforms; `labels` int64 (n,) and `boxes` float32 (n, 4) cxcywh in [0, 1]; with masks, `masks` bool
        (n, h, w).

        Raises:
            UserError: the image is unreadable and `on_unreadable` is "raise", or most tried images are.
        """
        item, attempts = self.item_or_none(index), 0
        while item is None:
            if self.on_unreadable == "leave out":
                return None
            # `item_or_none` raises once most images are unreadable, which ends the loop.
            attempts += 1
            with seeded(self.seed, int(self._epoch), index, attempts):
                index = int(torch.randint(len(self), ()))
            item = self.item_or_none(index)
        with seeded(self.seed, int(self._epoch), index):
            return self.transforms(*item)

    def coco_api(self) -> COCO:
        """The ground truth for pycocotools, including crowds; `segmentation` only if the data set has masks."""
        # Building the data set has already logged the warnings.
        data = load_annotations(self.annotation_file, self.annotated, self.remove_difficult, log=False)
        kept = set(self.image_ids)
        images = [image for image in data["images"] if image["id"] in kept]
        annotations = [a for a in data["annotations"] if a["image_id"] in kept]
        if self.with_masks:
            images, annotations = normalize_segmentations(images, annotations, self.annotation_file)
        else:
            # Unchecked segmentations must not reach pycocotools' C code.
            annotations = [{key: a[key] for key in a if key != "segmentation"} for a in annotations]
        return as_coco({"images": images, "annotations": annotations, "categories": data["categories"]})


def as_coco(dataset: dict, kind: type[COCO] = COCO) -> COCO:
    """A ground truth, a dict with `images`, `annotations` and `categories`, as pycocotools' object or one like it."""
    coco = kind()
    # pycocotools copies both into its results, and a file may lack them.
    coco.dataset = {"info": {}, "licenses": [], **dataset}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def collate(
    items: list[tuple[Tensor, dict[str, Tensor]] | None],
) -> tuple[NestedTensor, list[dict[str, Tensor]]] | None:
    """A padded batch of images (uint8 after `to_model_input`) and their targets; None if all items are None."""
    items = [item for item in items if item is not None]
    if not items:
        return None
    images, targets = zip(*items, strict=True)
    return nested_tensor_from_tensor_list(list(images)), list(targets)
