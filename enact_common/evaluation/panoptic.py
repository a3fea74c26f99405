"""Panoptic quality as COCO computes it, merged over ranks, and results in COCO's panoptic format.

Kirillov et al., "Panoptic Segmentation", CVPR 2019: for each category, PQ = SQ x RQ, the mean IoU of matched segments
times the F1 score of matching. The rules on void and crowds are those of COCO's evaluation (panopticapi), which is not
on PyPI. torchmetrics is on PyPI but has other rules: it ignores crowds, and forgives missed segments where the
prediction is void. The tests compare with hotcoco, which was checked against COCO's evaluation.

One rule differs for images with several crowds of one category, which COCO does not have: all of these crowds excuse a
segment that lies in them, not only the last one.
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
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from enact_common.data.panoptic import ID_LIMIT, VOID, PanopticTruth, encode_id_map, read_id_map
from enact_common.utils.distributed import gather_objects
from enact_common.utils.errors import UserError
from enact_common.utils.files import write_atomically, writing

logger = logging.getLogger(__name__)

# Means over all categories, things (_th) and stuff (_st), named as in DETR's log.
METRICS = ("PQ", "SQ", "RQ", "PQ_th", "SQ_th", "RQ_th", "PQ_st", "SQ_st", "RQ_st")

# Segments match above this IoU, which gives each at most one match. Predicted segments are excused above this fraction
# of their area in void or crowds.
HALF = 0.5

# Images are compared in threads, since sorting and decoding release the GIL.
MAX_THREADS = 8

# The results folder in a run's folder, and its content.
FOLDER, RESULTS, MASKS = "panoptic_results", "panoptic.json", "panoptic"


def check_results_folder(folder: Path) -> None:
    """Raise a UserError for a path that is a file, or a folder that contains anything except panoptic results."""
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= {RESULTS, MASKS}):
        raise UserError(f"{folder}: contains other files than panoptic results; choose another folder")


class Counts(NamedTuple):
    """Counts of matched and unmatched segments, by category.

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


def total(counts: Sequence[Counts]) -> Counts:
    """Return the sum of the counts of one or more images."""
    return Counts(*map(sum, zip(*counts, strict=True)))


def compare(
    truth: np.ndarray,
    true_segments: Sequence[dict],
    predicted: np.ndarray,
    predicted_segments: Sequence[dict],
    category_ids: Sequence[int],
) -> Counts:
    """Match the segments of one image, and return the counts by category.

    A true and a predicted segment of the same category match if their IoU is above 0.5; the union excludes pixels that
    are void in the truth. Crowds match nothing and do not count as missed. An unmatched predicted segment does not
    count as wrong if more than half of it lies in void or in crowds of its category.

    Args:
        truth, predicted: int (height, width), each pixel's segment id; ids without a segment are void.
        true_segments: dicts with `id`, `category_id` and `iscrowd`.
        predicted_segments: dicts with `id` and `category_id`.
        category_ids: ids in the order of the result. Predicted segments of other categories are void.

    Raises:
        ValueError: the maps' sizes differ.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"the truth has {truth.shape} pixels, the prediction {predicted.shape}")
    place = {category: i for i, category in enumerate(category_ids)}
    true_segments = [segment for segment in true_segments if segment["category_id"] in place]
    predicted_segments = [segment for segment in predicted_segments if segment["category_id"] in place]
    # Rows are true segments, columns are predicted segments; the last row and column are void.
    true_ids, predicted_ids = ([s["id"] for s in segments] for segments in (true_segments, predicted_segments))
    overlap = joint_areas(truth, true_ids, predicted, predicted_ids)
    true_category = np.array([place[segment["category_id"]] for segment in true_segments], dtype=np.int64)
    predicted_category = np.array([place[segment["category_id"]] for segment in predicted_segments], dtype=np.int64)
    crowd = np.array([bool(segment["iscrowd"]) for segment in true_segments], dtype=bool)

    true_area, predicted_area = overlap[:-1].sum(axis=1), overlap[:, :-1].sum(axis=0)
    inside, in_void = overlap[:-1, :-1], overlap[-1, :-1]
    same = true_category[:, None] == predicted_category[None, :]  # (true, predicted)
    union = true_area[:, None] + predicted_area[None, :] - inside - in_void[None, :]
    iou = np.where(same & ~crowd[:, None], inside / np.maximum(union, 1), 0)
    match = iou > HALF
    excused = in_void + (inside * (same & crowd[:, None])).sum(axis=0)
    wrong = ~match.any(axis=0) & ~(excused > HALF * predicted_area)
    missed = ~match.any(axis=1) & ~crowd

    rows, columns = match.nonzero()
    number = len(category_ids)
    return Counts(
        np.bincount(true_category[rows], weights=iou[rows, columns], minlength=number),
        np.bincount(true_category[rows], minlength=number),
        np.bincount(predicted_category[wrong], minlength=number),
        np.bincount(true_category[missed], minlength=number),
    )


def joint_areas(first: np.ndarray, first_ids: Sequence[int], second: np.ndarray, second_ids: Sequence[int]):
    """Return the number of pixels that each segment of one map shares with each segment of another map.

    Args:
        first, second: int (height, width), ids below 2^24.
        first_ids, second_ids: ids to count separately; all other ids count as one.

    Returns:
        int64 (first ids + 1, second ids + 1), in their order; the last row and column are for all other ids.
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
    """The result of an evaluation.

    Attributes:
        categories: dicts with `id`, `name` and `isthing`, in the order of the counts.
        counts: counts by category, over all images.
        images: number of evaluated images.
    """

    categories: list[dict]
    counts: Counts
    images: int

    def by_category(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return PQ, SQ and RQ by category, float64 (categories,) each, in [0, 1]; 0 if all counts are 0."""
        counts = self.counts
        half = counts.matched + (counts.wrong + counts.missed) / 2
        quality = counts.iou / np.maximum(half, HALF)
        return quality, counts.iou / np.maximum(counts.matched, 1), counts.matched / np.maximum(half, HALF)

    def figures(self) -> dict[str, float]:
        """Return the nine `METRICS` by name, in [0, 1]: means over the categories with matched, wrong or missed
        segments; -1 if there is no such category."""
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
    """A collector of predicted segments that computes COCO's panoptic metrics.

    Maps are kept on the host as PNG files, about 10 kB each for images of COCO's size.
    """

    def __init__(self):
        self._by_image: dict[int, tuple[bytes, list[dict]]] = {}

    def update(self, image_ids: Iterable[int], results: list[dict[str, Any]]) -> None:
        """Add a batch. A repeated image (distributed samplers repeat some) replaces its earlier results.

        Args:
            image_ids: id of each image.
            results: for each image a dict with `id_map`, int (h, w), a tensor or an array in the image's stored size,
                each pixel's segment id, 0 for none; and `segments`, dicts with `id`, from 1 to 2^24 - 1, `category_id`
                and optionally `score`.

        Raises:
            ValueError: map and segments have different ids, or an id is repeated or out of range.
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
                    f"image {image_id}: the map has segments {sorted(areas)[:20]}, but the list has {listed[:20]}"
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
        """Merge the segments of all ranks on every rank."""
        merged: dict[int, tuple[bytes, list[dict]]] = {}
        for part in gather_objects(self._by_image):
            merged |= part
        self._by_image = merged

    def evaluate(self, truth: PanopticTruth) -> PanopticQuality:
        """Match predicted to true segments in all images of the truth; an image without a result is missed.

        Images whose true PNG cannot be read are skipped with a warning.

        Raises:
            UserError: no true PNG can be read.
            ValueError: a result differs in size from its image.
        """
        category_ids = [category["id"] for category in truth.categories]

        def count_image(image_id: int) -> Counts | None:
            try:
                true_map = truth.id_map(image_id)
            except UserError as error:
                logger.warning("skipped in the panoptic metrics: %s", error)
                return None
            segments = truth.segments[image_id]
            if image_id not in self._by_image:
                return compare(true_map, segments, np.zeros_like(true_map), [], category_ids)
            predicted_map, predicted_segments = self._result(image_id)
            if predicted_map.shape != true_map.shape:
                raise ValueError(f"image {image_id}: the result has {predicted_map.shape} pixels, not {true_map.shape}")
            return compare(true_map, segments, predicted_map, predicted_segments, category_ids)

        with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            counts = [count for count in pool.map(count_image, truth.image_ids) if count is not None]
        if not counts:
            raise UserError(f"{truth.mask_folder}: no PNG file can be evaluated; the log says why")
        return PanopticQuality(truth.categories, total(counts), len(counts))

    def _result(self, image_id: int) -> tuple[np.ndarray, list[dict]]:
        """Return an image's map, int32 (h, w), and its segments."""
        encoded, segments = self._by_image[image_id]
        return read_id_map(io.BytesIO(encoded), Path(f"{image_id}.png")), segments

    def write_results(self, folder: Path, images: Iterable[dict], categories: Sequence[dict]) -> int:
        """Write the segments in COCO's panoptic format atomically, and return the number of images.

        The folder gets `panoptic.json` and PNG files in `panoptic/`. An earlier results folder is replaced. Segments of
        other categories become void.

        Args:
            folder: folder to create or replace.
            images: dicts with `id` and `file_name`; results of other images are not written.
            categories: dicts with `id`, `name` and `isthing`.

        Raises:
            UserError: the folder cannot be written, or contains anything except panoptic results.
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
                # A non-empty folder cannot be replaced in one step.
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
        """Write an image's PNG and return its entry of `annotations`."""
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
    """Return [x, y, width, height] in pixels of a mask, bool (height, width), with at least one pixel."""
    rows, columns = (mask.any(axis=axis).nonzero()[0] for axis in (1, 0))
    top, left = int(rows[0]), int(columns[0])
    return [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]


def panoptic_text(quality: PanopticQuality) -> str:
    """Return PQ, SQ and RQ of all categories, things and stuff, one line each; -1 without categories."""
    figures, lines = quality.figures(), [f"{'':<8} {'PQ':>7} {'SQ':>7} {'RQ':>7}"]
    for title, suffix in (("all", ""), ("things", "_th"), ("stuff", "_st")):
        values = (figures[name + suffix] for name in ("PQ", "SQ", "RQ"))
        lines.append(f"{title:<8} " + " ".join(f"{value:7.3f}" for value in values))
    return "\n".join(lines)


def panoptic_record(quality: PanopticQuality) -> dict[str, Any]:
    """Return the results of an evaluation in built-in types.

    Returns:
        a dict with `figures`, the nine `METRICS` by name; `images`, the number of evaluated images; and `classes`, a
        dict for each category with matched, wrong or missed segments: `category_id`, `name`, `isthing`, `PQ`, `SQ`,
        `RQ`, `matched`, `wrong` and `missed`.
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
    """Return a `panoptic_record` under the names of DETR's log: `test_PQ_all`, `test_PQ_th` and `test_PQ_st`, each with
    `pq`, `sq`, `rq`, in [0, 1], -1 without categories, and `n`, the number of categories in these means."""
    figures, classes = record["figures"], record["classes"]
    things = [c for c in classes if c["isthing"]]
    groups = {"all": classes, "th": things, "st": [c for c in classes if not c["isthing"]]}
    return {
        f"test_PQ_{group}": {
            **{name: figures[name.upper() + (f"_{group}" if group != "all" else "")] for name in ("pq", "sq", "rq")},
            "n": len(members),
        }
        for group, members in groups.items()
    }
