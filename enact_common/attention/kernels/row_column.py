"""Triton kernels of row-column products, over a map's cells or from its cells over clusters.

All are parts of one sum: over the rows h and columns w of a map and over members m (clusters or queries),

    sum of col[h, m] row[w, m] <member[m], cell[h, w]>

The product over clusters is its derivative by the cells, the product over the map its derivative by the members. The
gradients of either product are the other one and the derivatives by `col` and `row`, so three kernels compute all.
The products of weights stay in registers. Sums are float32 in a fixed order. Importing this file imports Triton.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Tiles: places (cells or members) of the result, and places to add up at a time.
PLACES, INNER = 64, 32

# Sizes that change from batch to batch: kernels are not compiled anew where one is 1 or a multiple of 16.
kernel = triton.jit(do_not_specialize=["batch", "height", "width", "members"])


@kernel
def cells_of(
    col, row, member, cell, height, width, members, channels, col_place, col_member, row_place, row_member,
    PLACES: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """cell[h, w] = sum over m of col[h, m] row[w, m] member[m]"""
    image = tl.program_id(1)
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    inside = place < height * width
    cols = col + image * height * members + (place // width) * col_place
    rows = row + image * width * members + (place % width) * row_place
    channel = tl.arange(0, CHANNELS)
    known = channel < channels
    total = tl.zeros((PLACES, CHANNELS), tl.float32)
    for start in range(0, members, INNER):
        other = start + tl.arange(0, INNER)
        both = inside[:, None] & (other < members)[None, :]
        weights = tl.load(rows[:, None] + other[None, :] * row_member, mask=both, other=0.0).to(tl.float32)
        weights *= tl.load(cols[:, None] + other[None, :] * col_member, mask=both, other=0.0).to(tl.float32)
        address = member + (image * members + other[:, None]) * channels + channel[None, :]
        vectors = tl.load(address, mask=(other < members)[:, None] & known[None, :], other=0.0)
        total += tl.dot(weights.to(vectors.dtype), vectors, input_precision=PRECISION)
    address = cell + (image * height * width + place[:, None]) * channels + channel[None, :]
    tl.store(address, total, mask=inside[:, None] & known[None, :])


@kernel
def members_of(
    col, row, cell, member, height, width, members, channels, col_place, col_member, row_place, row_member,
    PLACES: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """member[m] = sum over h and w of col[h, m] row[w, m] cell[h, w]"""
    image = tl.program_id(1)
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    inside = place < members
    cols = col + image * height * members + place * col_member
    rows = row + image * width * members + place * row_member
    channel = tl.arange(0, CHANNELS)
    known = channel < channels
    total = tl.zeros((PLACES, CHANNELS), tl.float32)
    for start in range(0, height * width, INNER):
        other = start + tl.arange(0, INNER)
        within = other < height * width
        both = inside[:, None] & within[None, :]
        weights = tl.load(rows[:, None] + (other % width)[None, :] * row_place, mask=both, other=0.0).to(tl.float32)
        weights *= tl.load(cols[:, None] + (other // width)[None, :] * col_place, mask=both, other=0.0).to(tl.float32)
        address = cell + (image * height * width + other[:, None]) * channels + channel[None, :]
        vectors = tl.load(address, mask=within[:, None] & known[None, :], other=0.0)
        total += tl.dot(weights.to(vectors.dtype), vectors, input_precision=PRECISION)
    address = member + (image * members + place[:, None]) * channels + channel[None, :]
    tl.store(address, total, mask=inside[:, None] & known[None, :])


@kernel
def weights_of(
    col, row, cell, member, col_out, row_out, batch, height, width, members, channels,
    col_place, col_member, row_place, row_member,
    PLACES: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The derivatives by `row`, and by `col` of one tile of columns: with p = <member[m], cell[h, w]>,

    row_out[w, m] = sum over h of col[h, m] p and col_out[tile, h, m] = sum over w in the tile of row[w, m] p
    """
    tile, image = tl.program_id(1), tl.program_id(2)
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    column = tile * INNER + tl.arange(0, INNER)
    channel = tl.arange(0, CHANNELS)
    inside, within, known = place < members, column < width, channel < channels
    both = within[:, None] & inside[None, :]
    rows = image * width * members + column[:, None] * row_place + place[None, :] * row_member
    weights = tl.load(row + rows, mask=both, other=0.0).to(tl.float32)
    vectors = member + (image * members + place[None, :]) * channels + channel[:, None]
    vectors = tl.load(vectors, mask=inside[None, :] & known[:, None], other=0.0)  # (CHANNELS, PLACES)
    total = tl.zeros((INNER, PLACES), tl.float32)
    for line in range(0, height):
        address = cell + ((image * height + line) * width + column[:, None]) * channels + channel[None, :]
        cells = tl.load(address, mask=within[:, None] & known[None, :], other=0.0)
        products = tl.dot(cells, vectors, input_precision=PRECISION)
        cols = image * height * members + line * col_place + place * col_member
        total += products * tl.load(col + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
        out = col_out + tile * batch * height * members + cols
        tl.store(out, tl.sum(products * weights, axis=0), mask=inside)
    tl.store(row_out + rows, total, mask=both)


@dataclass(frozen=True)
class Sizes:
    """Sizes and strides of a product.

    Attributes:
        batch, height, width, members, channels: B, H, W, M, e.
        members_last: the weights are (B, H or W, M), as over clusters, instead of (B, M, H or W).
    """

    batch: int
    height: int
    width: int
    members: int
    channels: int
    members_last: bool

    def numbers(self) -> tuple[int, ...]:
        """The integers that the kernels take: sizes, and the strides of places and members in `col` and in `row`."""
        sizes = self.height, self.width, self.members, self.channels
        return (*sizes, *((self.members, 1) * 2 if self.members_last else (1, self.height, 1, self.width)))

    def constants(self, dtype: torch.dtype) -> dict:
        """The constants of the kernels. Float32 is multiplied in three parts of TF32, which keep its precision."""
        precision = "tf32x3" if dtype == torch.float32 else "ieee"
        channels = max(triton.next_power_of_2(self.channels), 16)  # the least that a matrix product takes
        return {"PLACES": PLACES, "INNER": INNER, "CHANNELS": channels, "PRECISION": precision}


def sum_members(col: Tensor, row: Tensor, member: Tensor, sizes: Sizes) -> Tensor:
    """Return the cells (B, H, W, e) for members (B, M, e)."""
    cell = member.new_empty(sizes.batch, sizes.height, sizes.width, sizes.channels)
    grid = triton.cdiv(sizes.height * sizes.width, PLACES), sizes.batch
    cells_of[grid](col, row, member, cell, *sizes.numbers(), **sizes.constants(member.dtype))
    return cell


def sum_cells(col: Tensor, row: Tensor, cell: Tensor, sizes: Sizes) -> Tensor:
    """Return the members (B, M, e) for cells (B, H, W, e)."""
    member = cell.new_empty(sizes.batch, sizes.members, sizes.channels)
    grid = triton.cdiv(sizes.members, PLACES), sizes.batch
    members_of[grid](col, row, cell, member, *sizes.numbers(), **sizes.constants(cell.dtype))
    return member


def weight_gradients(col: Tensor, row: Tensor, cell: Tensor, member: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Return the gradients of `col` and `row` for cells (B, H, W, e) and members (B, M, e), one of them a gradient."""
    tiles = triton.cdiv(sizes.width, INNER)
    col_out = col.new_empty(tiles, *col.shape, dtype=torch.float32)
    row_out = torch.empty_like(row)
    grid = triton.cdiv(sizes.members, PLACES), tiles, sizes.batch
    weights_of[grid](
        col, row, cell, member, col_out, row_out, sizes.batch, *sizes.numbers(), **sizes.constants(cell.dtype)
    )
    return col_out.sum(dim=0).to(col.dtype), row_out


class _Product(torch.autograd.Function):
    """Either product, of contiguous tensors: members to cells if `sizes.members_last`, or cells to members."""

    @staticmethod
    def forward(ctx, col: Tensor, row: Tensor, value: Tensor, sizes: Sizes) -> Tensor:
        ctx.save_for_backward(col, row, value)
        ctx.sizes = sizes
        return (sum_members if sizes.members_last else sum_cells)(col, row, value, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        col, row, value = ctx.saved_tensors
        with torch.cuda.device_of(grad):
            return *gradients(col, row, value, grad.contiguous(), ctx.sizes), None


def gradients(col: Tensor, row: Tensor, value: Tensor, grad: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `col`, `row` and `value` for that of the product."""
    cell, member = (grad, value) if sizes.members_last else (value, grad)
    value_grad = (sum_cells if sizes.members_last else sum_members)(col, row, grad, sizes)
    return *weight_gradients(col, row, cell, member, sizes), value_grad


# Kinds of inputs whose backward kernels have run once.
_checked: set[tuple] = set()


def product(col: Tensor, row: Tensor, value: Tensor) -> Tensor:
    """Compute a row-column product.

    Args:
        col, row: (B, H, M) and (B, W, M), to sum over members; or (B, M, H) and (B, M, W), to sum over cells.
        value: members (B, M, e) or cells (B, H, W, e), in the dtype of both others.

    Returns:
        cells (B, H, W, e) or members (B, M, e), contiguous.
    """
    col, row, value = col.contiguous(), row.contiguous(), value.contiguous()
    members_last = value.ndim == 3
    (batch, *col_sizes), (_, *row_sizes) = col.shape, row.shape
    height, members = col_sizes if members_last else reversed(col_sizes)
    width = row_sizes[0 if members_last else 1]
    sizes = Sizes(batch, height, width, members, value.shape[-1], members_last)
    with torch.cuda.device_of(value):
        result = _Product.apply(col, row, value, sizes)
        kind = value.device, value.dtype, members_last, sizes.channels
        if torch.is_grad_enabled() and kind not in _checked:
            # PyTorch cannot take over once a forward pass is done.
            with torch.no_grad():
                gradients(col, row, value, torch.zeros_like(result), sizes)
            _checked.add(kind)
    return result
