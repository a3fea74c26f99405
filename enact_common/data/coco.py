"""COCO-format detection data: annotations checked and packed, items made, batches collated."""

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

# What becomes of an item whose image cannot be read: an error; another item in its place; None.
ON_UNREADABLE = ("raise", "replace", "leave out")

# Of an image: not tried yet, read, could not be read.
UNTRIED, READ, UNREADABLE = range(3)

# Unreadable images that make one suspect the whole data set, not them.
MANY = 8


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
