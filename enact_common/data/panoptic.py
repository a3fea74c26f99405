"""COCO's panoptic format: every pixel's segment in a PNG, every segment's category in a JSON file.

The format is COCO's version of Kirillov et al., "Panoptic Segmentation", CVPR 2019: a pixel (R, G, B) belongs to
segment R + 256 G + 65536 B; 0 is void, no segment. Targets follow DETR's panoptic model (Carion et al., ECCV 2020):
things and stuff are both objects, and labels are category ids.

Modifications:
    - Targets have no crowds, as in `CocoDetection`; the original trains on crowds.
    - Boxes extend to the far edge of their last pixel, as in COCO; a crop's boxes enclose the masks that remain in it.
"""

import io
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torchvision import tv_tensors

from enact_common.boxes import boxes_of_masks
from enact_common.data.annotations import load_lists, missing_files
from enact_common.data.categories import COCO_STUFF, LabelMap, coco_names
from enact_common.data.coco import CocoDetection, as_coco
from enact_common.data.images import open_image
from enact_common.data.values import as_mark, is_box, is_crowd, is_id, is_number, shown, wrong_id
from enact_common.utils.errors import UserError

logger = logging.getLogger(__name__)

# The number of labels of DETR's panoptic models: COCO's ids, up to 200, and some unused labels.
NUM_CLASSES = 250

# 0 is no segment; segment ids fit three bytes.
VOID, ID_LIMIT = 0, 2**24

LAYOUT = (
    "expected <coco_panoptic_path>/annotations/{name}.json or <coco_panoptic_path>/{name}.json, and a folder {name} of "
    "PNG files in either place"
)


def find_panoptic_split(coco_path: str, coco_panoptic_path: str, split: str) -> tuple[Path, Path, Path]:
    """The image folder, the annotation file and the folder of PNG files of a split: "train" or "val".

    The annotations are directly in `--coco_panoptic_path` or in its `annotations/`.

    Raises:
        UserError: a file or folder is missing.
    """
    images = image_folder(coco_path, split)
    root, name = Path(coco_panoptic_path), f"panoptic_{split}2017"
    if not root.is_dir():
        raise UserError(f"--coco_panoptic_path {coco_panoptic_path}: no such folder")
    places = (root / "annotations", root)
    file = next((place / f"{name}.json" for place in places if (place / f"{name}.json").is_file()), None)
    masks = next((place / name for place in places if (place / name).is_dir()), None)
    if file is None or masks is None:
        missing = root / "annotations" / (f"{name}.json" if file is None else name)
        hint = "; unpack it" if (missing.with_suffix(".zip")).is_file() else ""
        raise UserError(
            f"--coco_panoptic_path {coco_panoptic_path}: {missing} is missing{hint} ({LAYOUT.format(name=name)})"
        )
    return images, file, masks


def image_folder(coco_path: str, split: str) -> Path:
    """The folder of a split's images."""
    root = Path(coco_path)
    if not root.is_dir():
        raise UserError(f"--coco_path {coco_path}: no such folder")
    folders = (root / f"{split}2017", root / "images" / f"{split}2017")
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise UserError(f"--coco_path {coco_path}: {folders[0]} is missing, and so is {folders[1]}; one must exist")
    return folder


def panoptic_label_map(categories: list[dict], num_classes: int | None = None) -> LabelMap:
    """The label map whose labels equal the category ids.

    Args:
        categories: dicts with `id` and `name`.
        num_classes: number of the model's labels (`--num_classes`); None for 250, as in DETR's panoptic models.

    Raises:
        UserError: a category id is negative, or not below the number of labels.
    """
    names = {category["id"]: str(category["name"]) for category in categories}
    size = num_classes or NUM_CLASSES
    if min(names) < 0:
        raise UserError(f"category {min(names)} ({names[min(names)]}): panoptic labels are category ids, 0 or more")
    if max(names) >= size:
        given = f"--num_classes {size}" if num_classes else f"--num_classes is not given, which makes {size}"
        raise UserError(
            f"{given}: panoptic labels are category ids, up to {max(names)} here, which needs at least "
            f"{max(names) + 1}; pass --num_classes {max(names) + 1}"
            + (", or leave the flag out" if max(names) < NUM_CLASSES else "")
        )
    return LabelMap(
        tuple(label if label in names else None for label in range(size)),
        tuple(names.get(label, "N/A") for label in range(size)),
    )


def coco_panoptic_names() -> dict[int, str]:
    """The names of COCO's 133 panoptic categories by id: things up to 90, then stuff."""
    return {i: name for i, name in enumerate(coco_names()) if name != "N/A"} | COCO_STUFF


def things_of(label_map: LabelMap, source: str) -> tuple[int, ...]:
    """The labels of a panoptic model's things: those stored in the map, else COCO's for COCO's categories.

    Raises:
        UserError: the map stores no things, and has other categories than COCO's. The message names the source.
    """
    if label_map.things is not None:
        return label_map.things
    coco = coco_panoptic_names()
    labels = label_map.labels().values()
    other = next((label for label in labels if coco.get(label) != label_map.names[label]), None)
    if other is not None:
        raise UserError(
            f"{source}: does not say which categories are things and which are stuff, and the categories are not "
            f"COCO's ({other} {label_map.names[other]}). Add a list 'things' with the things' category ids to its dict "
            "'label_map' (torch.load, torch.save); checkpoints of this version have it"
        )
    return tuple(label for label in labels if label < len(coco_names()))


def load_panoptic(path: Path, log: bool = True) -> dict:
    """Load and check a panoptic annotation file: `images`, `annotations` (at most one per image) and `categories`.

    `normalise` converts numbers written as text, and ids written as floats. `iscrowd` and `isthing` become 0 or 1;
    segments with `"ignore": 1` become crowds. Converted values are logged unless `log` is False.

    Raises:
        UserError: a list or entry is invalid. The message names the file and the entry.
    """
    data = load_lists(path, ("images", "annotations", "categories"), log)
    for category in data["categories"]:
        if category.get("isthing") is None or as_mark(category["isthing"]) is None:
            raise UserError(
                f"{path}: category {category['id']} does not say whether it is a thing (isthing 1) or stuff (isthing 0)"
            )
    images = {image["id"] for image in data["images"]}
    categories = {category["id"] for category in data["categories"]}
    annotations: dict[int, dict] = {}
    for number, annotation in enumerate(data["annotations"], start=1):
        if not isinstance(annotation, dict) or not isinstance(annotation.get("segments_info"), list):
            raise UserError(
                f"{path}: annotation {number} has no list segments_info; --coco_panoptic_path needs COCO's panoptic "
                "annotations, not instances"
            )
        image_id, name = annotation.get("image_id"), annotation.get("file_name")
        if not is_id(image_id):
            raise UserError(f"{path}: annotation {number} belongs to image {wrong_id(image_id)}")
        if image_id not in images:
            raise UserError(f"{path}: annotation {number} belongs to image {image_id}, which is not in 'images'")
        where = f"{path}: annotation of image {image_id}"
        if image_id in annotations:
            raise UserError(f"{where} occurs twice")
        # An annotation file from elsewhere must not choose which files are read.
        if not isinstance(name, str) or not name or "\0" in name or Path(name).name != name:
            raise UserError(
                f"{where} has the file_name {repr(name)[:100]}: expected the name of a PNG file, without folders"
            )
        check_segments(annotation["segments_info"], categories, where)
        segments = [{**segment, "iscrowd": int(is_crowd(segment))} for segment in annotation["segments_info"]]
        annotations[image_id] = {**annotation, "segments_info": segments}
    if not annotations:
        raise UserError(f"{path}: the list 'annotations' is empty")
    things = [{**category, "isthing": int(as_mark(category["isthing"]))} for category in data["categories"]]
    return {"images": data["images"], "annotations": list(annotations.values()), "categories": things}


def check_segments(segments: list, categories: set[int], where: str) -> None:
    """Refuse an image's segments with a missing, invalid or duplicate id, or an unknown category."""
    ids: set[int] = set()
    for segment in segments:
        number = segment.get("id") if isinstance(segment, dict) else None
        if not is_id(number) or not VOID < number < ID_LIMIT:
            raise UserError(f"{where} has a segment without an id in 1 to 2^24 - 1: {shown(segment)}")
        if number in ids:
            raise UserError(f"{where} has two segments {number}")
        ids.add(number)
        category = segment.get("category_id")
        if not is_id(category):
            raise UserError(f"{where} has segment {number} of category {wrong_id(category)}")
        if category not in categories:
            raise UserError(f"{where} has segment {number} of category {category}, which is not in 'categories'")


def read_id_map(source: Path | BinaryIO, path: Path) -> np.ndarray:
    """Read each pixel's segment id from a PNG file, int32 (height, width), 0 for void.

    Args:
        source: the file's path, or the open file.
        path: the file's path, for the message.

    Raises:
        UserError: the file cannot be read completely, or is not 8-bit RGB.
    """
    try:
        with open_image(source) as image:
            if image.mode != "RGB":
                raise UserError(
                    f"{path}: a PNG of mode {image.mode}, but segment ids are 8-bit RGB; --coco_panoptic_path needs "
                    "COCO's panoptic PNG files, not semantic segmentation maps"
                )
            pixels = np.asarray(image).astype(np.int32)  # (height, width, 3)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: segment ids cannot be read ({getattr(error, 'strerror', None) or error})") from error
    return pixels[..., 0] + (pixels[..., 1] << 8) + (pixels[..., 2] << 16)


def encode_id_map(id_map: np.ndarray) -> bytes:
    """Encode segment ids, integers (height, width) from 0 to 2^24 - 1, as a PNG file."""
    pixels = np.stack([id_map >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)
    file = io.BytesIO()
    # The fastest level makes files a third larger, but these maps compress well anyway.
    Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def read_segments(path: Path, ids: Iterable[int], source: Path) -> np.ndarray:
    """`read_id_map` of a PNG file whose segments have these ids in the annotation file `source`.

    Raises:
        UserError: the file cannot be read, or its segments differ. The message names both files.
    """
    id_map = read_id_map(path, path)
    drawn, listed = set(np.unique(id_map).tolist()) - {VOID}, set(ids)
    if drawn - listed:
        raise UserError(f"{path}: has pixels of segment {min(drawn - listed)}, which {source} does not list")
    if listed - drawn:
        raise UserError(f"{path}: has no pixel of segment {min(listed - drawn)}, which {source} lists")
    return id_map


@dataclass(frozen=True)
class PanopticTruth:
    """The panoptic ground truth of a data set, for `PanopticEvaluator`.

    Attributes:
        annotation_file: COCO's panoptic JSON.
        mask_folder: folder of its PNG files.
        images: entries of `images`, with `id` and `file_name`.
        files: name of the PNG file, by image id.
        segments: dicts with `id`, `category_id` and `iscrowd`, by image id.
        categories: dicts with `id`, `name` and `isthing`.
    """

    annotation_file: Path
    mask_folder: Path
    images: list[dict]
    files: dict[int, str]
    segments: dict[int, list[dict]]
    categories: list[dict]

    @classmethod
    def load(cls, annotation_file: Path, mask_folder: Path, image_ids: Iterable[int] | None = None) -> "PanopticTruth":
        """Read an annotation file; `image_ids` are the images to keep, None for all.

        Raises:
            UserError: the file is invalid.
        """
        # Building the data set has already logged the warnings.
        data = load_panoptic(annotation_file, log=False)
        kept = {image["id"] for image in data["images"]} if image_ids is None else set(image_ids)
        annotations = [annotation for annotation in data["annotations"] if annotation["image_id"] in kept]
        annotated = {annotation["image_id"] for annotation in annotations}
        return cls(
            Path(annotation_file),
            Path(mask_folder),
            [image for image in data["images"] if image["id"] in annotated],
            {annotation["image_id"]: annotation["file_name"] for annotation in annotations},
            {annotation["image_id"]: annotation["segments_info"] for annotation in annotations},
            data["categories"],
        )

    @property
    def image_ids(self) -> list[int]:
        """The ids of all images, in the order of the file."""
        return list(self.segments)

    def id_map(self, image_id: int) -> np.ndarray:
        """The segment id of each pixel of an image, int32 (height, width); 0 is void. Errors as `read_segments`."""
        ids = [segment["id"] for segment in self.segments[image_id]]
        return read_segments(self.mask_folder / self.files[image_id], ids, self.annotation_file)


class CocoPanoptic(CocoDetection):
    """A data set of images with the masks, boxes and labels of things and stuff.

    Seeds, epochs, the cache and unreadable images work as in `CocoDetection`. An image also counts as unreadable if its
    PNG cannot be read, or does not match the image or the annotation. The cache holds only images.

    Args:
        image_folder: folder of the images.
        annotation_file: COCO's panoptic JSON. Images without an annotation are skipped.
        mask_folder: folder of the PNG files.
        transforms: maps (image, target) to the model's input.
        label_map: the label of each category; None for `panoptic_label_map` of the file's categories.
        num_classes: number of labels if label_map is None; None for 250.
        limit: keep only this many images, in the order of their ids; None keeps all.
        seed: seed of the augmentation.
        on_unreadable: one of `ON_UNREADABLE`.

    Raises:
        UserError: the annotations are invalid or do not fit the label map, or image or PNG files are missing.
    """

    def __init__(
        self,
        image_folder: Path,
        annotation_file: Path,
        mask_folder: Path,
        transforms: Callable[[tv_tensors.Image, dict], tuple[Tensor, dict]],
        label_map: LabelMap | None = None,
        num_classes: int | None = None,
        limit: int | None = None,
        seed: int = 0,
        on_unreadable: str = "raise",
    ):
        self.mask_folder = Path(mask_folder)
        super().__init__(
            image_folder, annotation_file, transforms, label_map, num_classes, limit, seed, on_unreadable=on_unreadable
        )

    def load(self, path: Path) -> dict:
        """As in `CocoDetection`, but only the images with an annotation."""
        data = load_panoptic(path)
        annotated = {annotation["image_id"] for annotation in data["annotations"]}
        images = [image for image in data["images"] if image["id"] in annotated]
        if len(images) < len(data["images"]):
            logger.warning("%s: %d images have no annotation and are skipped", path, len(data["images"]) - len(images))
        return {**data, "images": images}

    def own_labels(self, categories: list[dict], num_classes: int | None) -> LabelMap:
        """The `panoptic_label_map` of a file's categories."""
        return panoptic_label_map(categories, num_classes)

    def pack(self, annotations: list[dict], sizes: np.ndarray) -> None:
        """Store the names of the PNG files, which state their sizes, and the segments' ids, labels and crowd marks."""
        of_image = {annotation["image_id"]: annotation for annotation in annotations}
        own = [of_image[image_id] for image_id in self.image_ids]
        self.mask_names = [annotation["file_name"] for annotation in own]
        missing, _ = missing_files(self.mask_folder / name for name in self.mask_names)
        if missing:
            raise UserError(
                f"{self.annotation_file}: {len(missing)} of its {len(own)} PNG files are missing, {missing[0]} first; "
                "unpack all of them into that folder, or correct --coco_panoptic_path"
            )
        labels = self.label_map.labels()
        rows = [
            (segment["id"], labels[segment["category_id"]], bool(segment["iscrowd"]))
            for annotation in own
            for segment in annotation["segments_info"]
        ]
        table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
        self._segment_ids, self._labels, crowd = table.unbind(dim=1)
        self._crowd = crowd.bool()
        self._first = np.cumsum([0] + [len(annotation["segments_info"]) for annotation in own])

    @property
    def num_objects(self) -> int:
        """The number of segments in all targets."""
        return int((~self._crowd).sum())

    def id_map(self, index: int) -> np.ndarray:
        """The segment id of each pixel of an item, int32 (height, width); 0 is void. Errors as `read_segments`."""
        ids = self._segment_ids[self._first[index] : self._first[index + 1]].tolist()
        return read_segments(self.mask_folder / self.mask_names[index], ids, self.annotation_file)

    def item(self, index: int) -> tuple[tv_tensors.Image, dict]:
        """The stored image of an item, uint8 (3, height, width), and its target, before the transforms.

        The target has the keys of `CocoDetection`'s and `masks`, bool (n, height, width).

        Raises:
            UserError: the image or its PNG cannot be read, or their sizes differ.
        """
        image = tv_tensors.Image(self.image(index))
        height, width = image.shape[-2:]
        id_map = torch.from_numpy(self.id_map(index))
        if id_map.shape != (height, width):
            raise UserError(
                f"{self.mask_folder / self.mask_names[index]}: {id_map.shape[1]} x {id_map.shape[0]} pixels, but its "
                f"image {self.path(index)} has {width} x {height}; check --coco_path and --coco_panoptic_path"
            )
        segments = slice(self._first[index], self._first[index + 1])
        objects = ~self._crowd[segments]
        masks = id_map == self._segment_ids[segments][objects].to(torch.int32)[:, None, None]  # (n, height, width)
        target = {
            "image_id": torch.tensor([self.image_ids[index]]),
            "orig_size": torch.tensor([height, width]),
            "boxes": tv_tensors.BoundingBoxes(boxes_of_masks(masks), format="XYXY", canvas_size=(height, width)),
            "labels": self._labels[segments][objects],
            "masks": tv_tensors.Mask(masks),
        }
        return image, target

    def why_unreadable(self, index: int) -> str:
        """Why an item's image or PNG cannot be read, as text that starts with the file."""
        try:
            self.item(index)
        except UserError as error:
            return str(error)
        return super().why_unreadable(index)

    def truth(self) -> PanopticTruth:
        """The ground truth for `PanopticEvaluator`, including crowds."""
        return PanopticTruth.load(self.annotation_file, self.mask_folder, self.image_ids)

    def coco_api(self) -> COCO:
        """The things of these images as pycocotools ground truth for the box metrics, including crowds.

        Raises:
            UserError: a thing has no `bbox` or no `area`.
        """
        truth = self.truth()
        categories = [category for category in truth.categories if category["isthing"]]
        things = {category["id"] for category in categories}
        annotations = []
        for image_id, segments in truth.segments.items():
            for segment in segments:
                if segment["category_id"] not in things:
                    continue
                box, area = segment.get("bbox"), segment.get("area")
                if not (is_box(box) and is_number(area) and math.isfinite(area)):
                    raise UserError(
                        f"{self.annotation_file}: segment {segment['id']} of image {image_id} has no bbox of four "
                        "numbers or no area, which the box metrics need"
                    )
                # Drop other fields, such as an unchecked `segmentation`.
                own = {"category_id": segment["category_id"], "bbox": box, "area": area, "iscrowd": segment["iscrowd"]}
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, **own})
        return as_coco({"images": truth.images, "annotations": annotations, "categories": categories})
