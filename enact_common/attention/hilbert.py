"""The order of a feature map's cells along a Hilbert curve, for rectangles of any sides.

In row order, neighbours in the sequence are only horizontal neighbours in the image, and a window is a thin strip. A
stretch of Hilbert's curve (Math. Ann. 38, 1891) is a compact patch at any length. Rectangles follow Jakub Červený's
generalised curve (https://github.com/jakubcerveny/gilbert): a rectangle much longer than wide is halved; any other is
cut into three parts, and the curve runs up the first, across the second and down the third.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

# Orders in which a map's cells are clustered: row by row, or along the curve.
ORDERS = ROWS, HILBERT = ("rows", "hilbert")


@lru_cache(maxsize=256)
def hilbert_permutations(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `hilbert_order` on a device and its inverse, which restores row order. Cached per map size."""
    # The cached tensors must serve training too, even if inference asks first.
    with torch.inference_mode(False):
        order = hilbert_order(height, width).to(device)
        return order, order.argsort()


def hilbert_order(height: int, width: int) -> Tensor:
    """The cells of a map in the curve's order: int64 (height * width,), each cell's index in row order.

    Successive cells share a side; at parts with odd sides a few share only a corner.

    Args:
        height, width: at least 1.
    """
    return torch.tensor(_indices(height, width))


@lru_cache(maxsize=256)
def _indices(height: int, width: int) -> tuple[int, ...]:
    along, across = ((width, 0), (0, height)) if width >= height else ((0, height), (width, 0))
    return tuple(y * width + x for x, y in _walk((0, 0), along, across))


def _walk(start: tuple[int, int], along: tuple[int, int], across: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield the cells (x, y) of the rectangle that two vectors span, ending at the far end of the first one.

    Args:
        start: the first cell.
        along, across: the two vectors, one parallel to each axis.
    """
    length, breadth = abs(sum(along)), abs(sum(across))
    step, side = _unit(along), _unit(across)
    if breadth == 1 or length == 1:
        count, towards = (length, step) if breadth == 1 else (breadth, side)
        yield from (_add(start, towards, i) for i in range(count))
        return
    half, rise = length // 2, breadth // 2
    if 2 * length > 3 * breadth:
        # With an even half, the curve ends where the other half starts.
        half += half % 2 == 1 and length > 2
        yield from _walk(start, _scaled(step, half), across)
        yield from _walk(_add(start, step, half), _scaled(step, length - half), across)
        return
    rise += rise % 2 == 1 and breadth > 2
    yield from _walk(start, _scaled(side, rise), _scaled(step, half))
    yield from _walk(_add(start, side, rise), along, _scaled(side, breadth - rise))
    corner = _add(_add(start, step, length - 1), side, rise - 1)
    yield from _walk(corner, _scaled(side, -rise), _scaled(step, half - length))


def _unit(vector: tuple[int, int]) -> tuple[int, int]:
    return tuple((part > 0) - (part < 0) for part in vector)


def _scaled(unit: tuple[int, int], by: int) -> tuple[int, int]:
    return unit[0] * by, unit[1] * by


def _add(cell: tuple[int, int], unit: tuple[int, int], times: int) -> tuple[int, int]:
    return cell[0] + times * unit[0], cell[1] + times * unit[1]
