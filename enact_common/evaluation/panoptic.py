"""Panoptic quality as COCO computes it, merged over processes, and results in COCO's panoptic format.

Kirillov et al., "Panoptic Segmentation", CVPR 2019: of each category, PQ = SQ x RQ, the mean IoU of what was matched
times the F1 score of matching. The rules on void and crowds are those of COCO's evaluation (panopticapi), which is not
on PyPI. torchmetrics, which is, has others: it knows no crowds, and forgives segments that are missed where the
prediction is void. The tests compare with hotcoco, which was checked against COCO's evaluation.

One rule differs where an image has several crowds of one category, which COCO's images have not: all of them excuse a
segment that lies in them, not the last alone.
"""

import io
import json
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from enact_common.data.panoptic import ID_LIMIT, VOID, PanopticTruth, encode_id_map, read_id_map
from enact_common.utils.distributed import gather_objects
from enact_common.utils.errors import UserError
from enact_common.utils.files import write_atomically, writing

logger = logging.getLogger(__name__)

# Of all categories, of things (_th) and of stuff (_st), as DETR's log has them.
METRICS = ("PQ", "SQ", "RQ", "PQ_th", "SQ_th", "RQ_th", "PQ_st", "SQ_st", "RQ_st")

# More than this part of two segments together, or of what is void or a crowd: only one can have more than a half.
HALF = 0.5

# Images are compared in parallel: sorting and decoding let other threads run.
MAX_THREADS = 8

# A folder of results, in a run's, and what is in it.
FOLDER, RESULTS, MASKS = "panoptic_results", "panoptic.json", "panoptic"


def check_results_folder(folder: Path) -> None:
    """Refuse to replace a folder that holds something else than panoptic results.

    Raises:
        UserError: it does, or there is a file of this name.
    """
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= {RESULTS, MASKS}):
        raise UserError(f"{folder}: holds something else than panoptic results; choose another folder for them")


@dataclass(frozen=True)
class Counts:
    """What was matched, by category.

    Attributes:
        iou: float64 (categories,), the sum of the matches' IoU.
        matched: int64 (categories,), true positives.
        wrong: int64 (categories,), predicted segments without a match.
        missed: int64 (categories,), true segments without a match.
    """

    iou: np.ndarray
    matched: np.ndarray
    wrong: np.ndarray
    missed: np.ndarray

    @classmethod
    def zeros(cls, categories: int) -> "Counts":
        """Of nothing."""
        return cls(np.zeros(categories), *(np.zeros(categories, dtype=np.int64) for _ in range(3)))

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.iou + other.iou, self.matched + other.matched, self.wrong + other.wrong, self.missed + other.missed
        )


def compare(
    truth: np.ndarray,
    true_segments: Sequence[dict],
    found: np.ndarray,
    found_segments: Sequence[dict],
    category_ids: Sequence[int],
) -> Counts:
    """Match the segments of one image.

    A true and a predicted segment of the same category match where their IoU is above 0.5, pixels that are void in the
    truth left out of the union. Crowds match nothing and are not missed. A predicted segment without a match is not
    wrong where more than half of it lies in void or in crowds of its category.

    Args:
        truth: int (height, width), each pixel's true segment; what is no id of a segment is void.
        true_segments: dicts with `id`, `category_id` and `iscrowd`.
        found: int (height, width), likewise predicted.
        found_segments: dicts with `id` and `category_id`.
        category_ids: in the order of the result. Predicted segments of other categories are void.

    Returns:
        the counts, by category.

    Raises:
        ValueError: the maps' sizes differ.
    """
    if truth.shape != found.shape:
        raise ValueError(f"the truth has {truth.shape} pixels, the prediction {found.shape}")
    place = {category: i for i, category in enumerate(category_ids)}
    true_segments = [segment for segment in true_segments if segment["category_id"] in place]
    found_segments = [segment for segment in found_segments if segment["category_id"] in place]
    # Rows are true segments, columns predicted ones; the last of both is void.
    overlap = joint_areas(
        truth, [segment["id"] for segment in true_segments], found, [segment["id"] for segment in found_segments]
    )
    true_category = np.array([place[segment["category_id"]] for segment in true_segments], dtype=np.int64)
    found_category = np.array([place[segment["category_id"]] for segment in found_segments], dtype=np.int64)
    crowd = np.array([bool(segment["iscrowd"]) for segment in true_segments], dtype=bool)

    true_area, found_area = overlap[:-1].sum(axis=1), overlap[:, :-1].sum(axis=0)
    inside, in_void = overlap[:-1, :-1], overlap[-1, :-1]
    same = true_category[:, None] == found_category[None, :]  # (true, found)
    union = true_area[:, None] + found_area[None, :] - inside - in_void[None, :]
    iou = np.where(same & ~crowd[:, None], inside / np.maximum(union, 1), 0)
    match = iou > HALF
    excused = in_void + (inside * (same & crowd[:, None])).sum(axis=0)
    wrong = ~match.any(axis=0) & ~(excused > HALF * found_area)
    missed = ~match.any(axis=1) & ~crowd

    rows, columns = match.nonzero()
    number = len(category_ids)
    return Counts(
        np.bincount(true_category[rows], weights=iou[rows, columns], minlength=number),
        np.bincount(true_category[rows], minlength=number),
        np.bincount(found_category[wrong], minlength=number),
        np.bincount(true_category[missed], minlength=number),
    )


def joint_areas(first: np.ndarray, first_ids: Sequence[int], second: np.ndarray, second_ids: Sequence[int]):
    """How many pixels each segment of one map shares with each of another.

    Args:
        first, second: int (height, width), ids below 2^24.
        first_ids, second_ids: which ids are looked at; all others are taken together.

    Returns:
        int64 (first ids + 1, second ids + 1), in their order; the last row and column are of all others.
    """
    pairs, areas = np.unique(first.astype(np.int64) * ID_LIMIT + second, return_counts=True)
    rows = {number: i for i, number in enumerate(first_ids)}
    columns = {number: i for i, number in enumerate(second_ids)}
    shared = np.zeros((len(rows) + 1, len(columns) + 1), dtype=np.int64)
    for pair, area in zip(pairs.tolist(), areas.tolist(), strict=True):
        shared[rows.get(pair // ID_LIMIT, -1), columns.get(pair % ID_LIMIT, -1)] += area
    return shared


@dataclass(frozen=True)
class PanopticQuality:
    """What an evaluation found.

    Attributes:
        categories: dicts with `id`, `name` and `isthing`, in the order of the counts.
        counts: by category, over all images.
        images: how many were evaluated.
    """

    categories: list[dict]
    counts: Counts
    images: int

    def by_category(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """PQ, SQ and RQ of each category, float64 (categories,) each, in [0, 1]; 0 where nothing is counted."""
        counts = self.counts
        half = counts.matched + (counts.wrong + counts.missed) / 2
        quality = counts.iou / np.maximum(half, HALF)
        return quality, counts.iou / np.maximum(counts.matched, 1), counts.matched / np.maximum(half, HALF)

    def figures(self) -> dict[str, float]:
        """The nine `METRICS` by name, in [0, 1]: means over the categories in which anything was matched, wrong or
        missed; -1 where there is none."""
        counts = self.counts
        occurs = counts.matched + counts.wrong + counts.missed > 0
        thing = np.array([bool(category["isthing"]) for category in self.categories], dtype=bool)
        groups = (("", occurs), ("_th", occurs & thing), ("_st", occurs & ~thing))
        by_category = dict(zip(("PQ", "SQ", "RQ"), self.by_category(), strict=True))
        return {
            name + suffix: float(values[group].mean()) if group.any() else -1.0
            for suffix, group in groups
            for name, values in by_category.items()
        }


class PanopticEvaluator:
    """Collects predicted segments image by image and computes COCO's panoptic figures.

    Maps are kept as PNG files on the host, some 10 kB each of images like COCO's.
    """

    def __init__(self):
        self._by_image: dict[int, tuple[bytes, list[dict]]] = {}

    def update(self, image_ids: Iterable[int], results: list[dict[str, Any]]) -> None:
        """Add a batch.

        Args:
            image_ids: of each image. An image that is given again (distributed samplers repeat some) replaces
                itself.
            results: of each image a dict with `id_map`, int (h, w), a tensor or an array, each pixel's segment, 0 for
                none, of the size that the image is stored in; and `segments`, dicts with `id`, from 1 to 2^24 - 1, and
                `category_id`, and a `score` where there is one.

        Raises:
            ValueError: map and segments do not have the same ids, or an id stands twice or is out of range.
        """
        for image_id, result in zip(image_ids, results, strict=True):
            id_map = result["id_map"]
            id_map = id_map.detach().cpu().numpy() if isinstance(id_map, Tensor) else np.asarray(id_map)
            ids, areas = np.unique(id_map, return_counts=True)
            areas = dict(zip(ids.tolist(), areas.tolist(), strict=True))
            areas.pop(VOID, None)
            listed = [int(segment["id"]) for segment in result["segments"]]
            if sorted(areas) != sorted(listed):
                raise ValueError(
                    f"image {image_id}: the map has segments {sorted(areas)[:20]}, listed are {listed[:20]}"
                )
            if listed and not (min(listed) > VOID and max(listed) < ID_LIMIT):
                raise ValueError(f"image {image_id}: segment ids must be from 1 to 2^24 - 1, got {listed[:20]}")
            segments = [
                {
                    "id": number,
                    "category_id": int(segment["category_id"]),
                    "iscrowd": 0,
                    "area": areas[number],
                    **({"score": round(float(segment["score"]), 5)} if "score" in segment else {}),
                }
                for number, segment in zip(listed, result["segments"], strict=True)
            ]
            self._by_image[int(image_id)] = (encode_id_map(id_map), segments)

    def synchronize(self) -> None:
        """Bring the segments of all processes together in each."""
        merged: dict[int, tuple[bytes, list[dict]]] = {}
        for part in gather_objects(self._by_image):
            merged |= part
        self._by_image = merged

    def evaluate(self, truth: PanopticTruth) -> PanopticQuality:
        """Match predicted to true segments.

        Images whose true PNG cannot be read are left out, with a warning.

        Args:
            truth: its images are what is evaluated; of those without a result, all segments are missed.

        Raises:
            UserError: no image's true PNG can be read.
            ValueError: a result has another size than its image.
        """
        category_ids = [category["id"] for category in truth.categories]

        def of_image(image_id: int) -> Counts | None:
            try:
                true_map = truth.id_map(image_id)
            except UserError as error:
                logger.warning("left out of the panoptic figures: %s", error)
                return None
            segments = truth.segments[image_id]
            if image_id not in self._by_image:
                return compare(true_map, segments, np.zeros_like(true_map), [], category_ids)
            found_map, found_segments = self._result(image_id)
            if found_map.shape != true_map.shape:
                raise ValueError(f"image {image_id}: the result has {found_map.shape} pixels, not {true_map.shape}")
            return compare(true_map, segments, found_map, found_segments, category_ids)

        with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            counts = [count for count in pool.map(of_image, truth.image_ids) if count is not None]
        if not counts:
            raise UserError(f"{truth.mask_folder}: no PNG file can be evaluated; the log says why")
        return PanopticQuality(truth.categories, sum(counts, Counts.zeros(len(category_ids))), len(counts))

    def _result(self, image_id: int) -> tuple[np.ndarray, list[dict]]:
        """An image's map, int32 (h, w), and its segments."""
        encoded, segments = self._by_image[image_id]
        return read_id_map(io.BytesIO(encoded), Path(f"{image_id}.png")), segments

    def write_results(self, folder: Path, images: Iterable[dict], categories: Sequence[dict]) -> int:
        """Write the segments in COCO's panoptic format, whole or not at all.

        The folder gets `panoptic.json` and PNG files in `panoptic/`. An earlier one is replaced. Segments of other
        categories become void.

        Args:
            folder: to make or to replace.
            images: dicts with `id` and `file_name`; results of other images are not written.
            categories: dicts with `id`, `name` and `isthing`.

        Returns:
            how many images there are.

        Raises:
            UserError: it cannot be written, or there is something else of this name.
        """
        check_results_folder(folder)
        images = [image for image in images if image["id"] in self._by_image]
        known = {category["id"] for category in categories}
        partial, replaced = (folder.with_name(folder.name + suffix) for suffix in (".partial", ".replaced"))
        with writing(folder):
            for leftover in (partial, replaced):
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                (partial / MASKS).mkdir(parents=True)
                annotations = [self._write_image(partial / MASKS, image["id"], known) for image in images]
                content = {"images": images, "annotations": annotations, "categories": categories}
                write_atomically(partial / RESULTS, lambda file: file.write(json.dumps(content).encode()))
                # A folder that holds something cannot be replaced in one step.
                if folder.exists():
                    os.replace(folder, replaced)
                os.replace(partial, folder)
            finally:
                if replaced.exists() and not folder.exists():
                    os.replace(replaced, folder)
                for leftover in (partial, replaced):
                    shutil.rmtree(leftover, ignore_errors=True)
        return len(images)

    def _write_image(self, folder: Path, image_id: int, known: set[int]) -> dict:
        """Write an image's PNG; its entry of `annotations`."""
        encoded, segments = self._by_image[image_id]
        kept = [segment for segment in segments if segment["category_id"] in known]
        id_map, _ = self._result(image_id)
        if len(kept) < len(segments):
            id_map = np.where(np.isin(id_map, [segment["id"] for segment in kept]), id_map, VOID)
            encoded = encode_id_map(id_map)
        name = f"{image_id:012d}.png"
        write_atomically(folder / name, lambda file: file.write(encoded), sync=False)
        boxes = [bounding_box(id_map == segment["id"]) for segment in kept]
        segments = [{**segment, "bbox": box} for segment, box in zip(kept, boxes, strict=True)]
        return {"image_id": image_id, "file_name": name, "segments_info": segments}


def bounding_box(mask: np.ndarray) -> list[int]:
    """[x, y, width, height] in pixels of a mask, bool (height, width), that has some."""
    rows, columns = (mask.any(axis=axis).nonzero()[0] for axis in (1, 0))
    top, left = int(rows[0]), int(columns[0])
    return [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]


def panoptic_text(quality: PanopticQuality) -> str:
    """PQ, SQ and RQ of all categories, of things and of stuff, a line each; -1 where there is none."""
    figures, lines = quality.figures(), [f"{'':<8} {'PQ':>7} {'SQ':>7} {'RQ':>7}"]
    for title, suffix in (("all", ""), ("things", "_th"), ("stuff", "_st")):
        values = (figures[name + suffix] for name in ("PQ", "SQ", "RQ"))
        lines.append(f"{title:<8} " + " ".join(f"{value:7.3f}" for value in values))
    return "\n".join(lines)


def panoptic_record(quality: PanopticQuality) -> dict[str, Any]:
    """What an evaluation found, in built-in types alone.

    Returns:
        a dict with `figures`, the nine `METRICS` by name; `images`, how many were evaluated; and `classes`, of each
        category in which anything was matched, wrong or missed, a dict with `category_id`, `name`, `isthing`, `PQ`,
        `SQ`, `RQ`, `matched`, `wrong` and `missed`.
    """
    counts, classes = quality.counts, []
    columns = (*quality.by_category(), counts.matched, counts.wrong, counts.missed)
    for category, *values in zip(quality.categories, *(column.tolist() for column in columns), strict=True):
        row = dict(zip(("PQ", "SQ", "RQ", "matched", "wrong", "missed"), values, strict=True))
        if row["matched"] or row["wrong"] or row["missed"]:
            own = {"category_id": category["id"], "name": str(category["name"]), "isthing": bool(category["isthing"])}
            classes.append({**own, **row})
    return {"figures": quality.figures(), "images": quality.images, "classes": classes}


def panoptic_metrics(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """A `panoptic_record` under the names of DETR's log: `test_PQ_all`, `test_PQ_th` and `test_PQ_st`, each a dict of
    `pq`, `sq`, `rq`, in [0, 1], -1 where there is no category, and `n`, how many categories they are means over."""
    figures, classes = record["figures"], record["classes"]
    groups = {
        "all": classes,
        "th": [c for c in classes if c["isthing"]],
        "st": [c for c in classes if not c["isthing"]],
    }
    return {
        f"test_PQ_{group}": {
            **{name: figures[name.upper() + (f"_{group}" if group != "all" else "")] for name in ("pq", "sq", "rq")},
            "n": len(members),
        }
        for group, members in groups.items()
    }
