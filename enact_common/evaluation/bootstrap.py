"""Bootstrap of AP over images: how much of a difference between two detectors is the choice of the images.

Resampled images count as often as they are drawn. hotcoco 1.3 counts each of them once, which makes its intervals about
a quarter too narrow, so it is not used here. The matching of detections and objects is pycocotools'.
"""

from dataclasses import dataclass

import numpy as np
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

# The metrics, as (name, index of the area range, index of the IoU threshold or None for the mean of all ten).
RESAMPLED = (("AP", 0, None), ("AP50", 0, 0), ("AP75", 0, 5), ("APS", 1, None), ("APM", 2, None), ("APL", 3, None))

# Size of the arrays of a group of draws, to bound the memory.
ELEMENTS = 2_000_000

# Share of the resamples inside an interval.
CONFIDENCE = 0.95


@dataclass
class Ranking:
    """The detections of one class, area range and IoU threshold that AP depends on, by falling score.

    Attributes:
        image: int64 (d,), index of each detection's image.
        hits: int64 (h,), ascending indices of the true positives; all others are false positives.
        objects: float32 (n,), number of objects in each image.
    """

    image: np.ndarray
    hits: np.ndarray
    objects: np.ndarray


def rankings_of(evaluation: COCOeval, area: int) -> list[list[Ranking]]:
    """Return the rankings of an evaluation after its `evaluate()`: for each class, one per IoU threshold."""
    params = evaluation.params
    images, areas = len(params.imgIds), len(params.areaRng)
    starts = [(k * areas + area) * images for k in range(len(params.catIds))]
    return [rank(evaluation.evalImgs[start : start + images], len(params.iouThrs)) for start in starts]


def rank(cells: list[dict | None], thresholds: int) -> list[Ranking]:
    """Rank pycocotools' results of one class and area range over all images; None is an image without either."""
    objects = np.array([0 if cell is None else (np.asarray(cell["gtIgnore"]) == 0).sum() for cell in cells])
    known = [(i, cell) for i, cell in enumerate(cells) if cell is not None]
    image = np.concatenate([[], *(np.full(len(cell["dtScores"]), i) for i, cell in known)]).astype(np.int64)
    scores = np.concatenate([[], *(cell["dtScores"] for _, cell in known)])
    empty = np.zeros((thresholds, 0))
    order = np.argsort(-scores, kind="stable")
    matched = np.concatenate([empty, *(cell["dtMatches"] for _, cell in known)], axis=1)[:, order] > 0  # (10, d)
    ignored = np.concatenate([empty, *(cell["dtIgnore"] for _, cell in known)], axis=1)[:, order] > 0
    rankings = []
    for hit, left_out in zip(matched & ~ignored, ignored, strict=True):
        # AP reads no precision after the last hit.
        last = np.flatnonzero(hit)[-1:]
        kept = np.flatnonzero(~left_out[: last[0] + 1]) if len(last) else last
        rankings.append(Ranking(image[order[kept]], np.flatnonzero(hit[kept]), objects.astype(np.float32)))
    return rankings


def average_precision(ranking: Ranking, draws: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """Return AP in draws (draws, n) of how often each image counts: float64 (draws,), NaN without objects."""
    total = (draws @ ranking.objects).astype(np.float64)
    if not len(ranking.hits):
        return np.where(total == 0, np.nan, 0.0)
    weights = np.take(draws, ranking.image, axis=1)  # (draws, d)
    # float32 is exact for counts.
    positives = weights.cumsum(axis=1, dtype=np.float32)[:, ranking.hits].astype(np.float64)  # (draws, h)
    hits = weights[:, ranking.hits].cumsum(axis=1, dtype=np.float64)
    precision = hits / np.maximum(positives, 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    reached = hits / np.maximum(total, 1)[:, None]
    # The number of recalls at which AP reads the precision of each hit.
    reads = np.diff(np.searchsorted(recalls, reached, side="right"), axis=1, prepend=0)
    return np.where(total == 0, np.nan, (envelope * reads).sum(axis=1) / len(recalls))


def resampled_metrics(evaluation: COCOeval, draws: np.ndarray, name: str = "") -> np.ndarray:
    """Return the metrics of `RESAMPLED` in each draw, float64 (draws, 6); NaN if a draw has no such object.

    Args:
        evaluation: pycocotools' evaluation after its `evaluate()`.
        draws: (draws, images), how often each image, by its index in `params.imgIds`, was drawn.
        name: title of the progress bar.
    """
    draws, recalls = draws.astype(np.float32), np.asarray(evaluation.params.recThrs)
    areas = range(1 + max(area for _, area, _ in RESAMPLED))
    tables = []
    for area in tqdm(areas, desc=name, unit="area range", leave=False, disable=None):
        classes = rankings_of(evaluation, area)
        table = np.full((len(draws), len(classes), len(evaluation.params.iouThrs)), np.nan)
        for k, rankings in enumerate(classes):
            for t, ranking in enumerate(rankings):
                step = max(ELEMENTS // max(len(ranking.image), 1), 1)
                for start in range(0, len(draws), step):
                    chunk = slice(start, start + step)
                    table[chunk, k, t] = average_precision(ranking, draws[chunk], recalls)
        tables.append(table)
    columns = [tables[area] if threshold is None else tables[area][..., threshold] for _, area, threshold in RESAMPLED]
    return np.stack([mean_without_nan(column.reshape(len(draws), -1)) for column in columns], axis=1)


def mean_without_nan(table: np.ndarray) -> np.ndarray:
    """Return each row's mean over the values that are not NaN; NaN for a row of NaN."""
    counted = ~np.isnan(table)
    numbers = counted.sum(axis=1)
    return np.where(numbers > 0, np.nansum(table, axis=1) / np.maximum(numbers, 1), np.nan)


def draw_images(images: int, resamples: int, seed: int) -> np.ndarray:
    """Return how often each image is drawn: int64 (1 + resamples, images). The first row has each image once."""
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(images, np.full(images, 1 / images), size=resamples)
    return np.concatenate((np.ones((1, images), dtype=np.int64), drawn))


def difference_intervals(first: np.ndarray, second: np.ndarray) -> dict[str, dict[str, float]]:
    """Return the differences of two detectors' metrics in the same draws, the first of which has each image once.

    Returns:
        for each metric of `RESAMPLED` that both have, `difference` (second - first), and `low` and `high`, the ends of
            the percentile interval of `CONFIDENCE`.
    """
    intervals = {}
    for j, (name, _, _) in enumerate(RESAMPLED):
        differences = second[:, j] - first[:, j]
        resampled = differences[1:][~np.isnan(differences[1:])]
        if len(resampled) and not np.isnan(differences[0]):
            low, high = np.quantile(resampled, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
            intervals[name] = {"difference": float(differences[0]), "low": float(low), "high": float(high)}
    return intervals
