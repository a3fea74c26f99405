"""The sums of row-column decoupled attention, without the large products in their definition.

Attention weights over a map's cells, or from its cells over clusters, are products of a column's and a row's weights
(Wang et al., "Anchor DETR", AAAI 2022, section 3.4; over clusters: Savathrakis and Argyros, arXiv:2409.07541). One of
the two factors scales or sums the values, and the other is then a matrix product. The intermediate between them (one
side of the map times clusters or queries times channels) is computed in slices and recomputed in the backward pass,
which stores only the inputs.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from enact_common.attention.kernels import AUTO, attempt, reason_against_products, wants_triton
from enact_common.attention.tracing import is_tracing

# Elements of a slice's largest intermediate; up to three of them exist at a time.
# On a CPU they should fit the cache: of 2^16, 2^17, ..., 2^23 this was the fastest, by little, on two cores with a
# 32 MiB L3 cache (`python -m enact_common.benchmark rowcol` measures other values). On other devices, intermediates
# pass through memory at any size and each slice costs about a dozen launches. So there are few slices there, with
# intermediates of 256 MiB in float32.
CACHE_SLICE = 2**20
MEMORY_SLICE = 2**26


def clustered_row_column_product(col: Tensor, row: Tensor, value: Tensor, kernels: str = AUTO) -> Tensor:
    """Each cell's sum over clusters: `out[h, w] = sum_m col[h, m] row[w, m] value[m]`.

    The shorter side's weights scale the values; the longer side's weights are then a matrix product.

    Args:
        col: (B, H, M), B being batch times heads.
        row: (B, W, M).
        value: (B, M, e).
        kernels: as in `EntropyClustering`.

    Returns:
        (B, H, W, e) in the inputs' dtype, also under autocast; in memory, PyTorch puts the longer side first. It is
        differentiable once.

    Raises:
        ValueError: shapes do not fit, or dtypes differ.
    """
    fits = col.ndim == row.ndim == value.ndim == 3
    fits = fits and col.shape[::2] == row.shape[::2] == value.shape[:2]
    _check(fits, "col (B, H, M), row (B, W, M), value (B, M, e)", col, row, value)
    if is_tracing():
        scaled = value.unsqueeze(3) * col.transpose(1, 2).unsqueeze(2)  # (B, M, e, H)
        sums = (row @ scaled.flatten(2)).unflatten(2, scaled.shape[2:])  # (B, W, e, H)
        return sums.permute(0, 3, 1, 2)
    if (result := _by_kernels(col, row, value, kernels)) is not None:
        return result
    if col.shape[1] > row.shape[1]:
        return _ClusteredProduct.apply(row, col, value)
    return _ClusteredProduct.apply(col, row, value).transpose(1, 2)


def row_column_product(row: Tensor, col: Tensor, value: Tensor, kernels: str = AUTO) -> Tensor:
    """Each query's sum over the map: `out[q] = sum_h col[q, h] sum_w row[q, w] value[h, w]`.

    The longer side is summed first, as a matrix product.

    Args:
        row: (B, Q, W), B being batch times heads.
        col: (B, Q, H).
        value: (B, H, W, e).
        kernels: as in `EntropyClustering`.

    Returns:
        (B, Q, e), contiguous, in the inputs' dtype, also under autocast. It is differentiable once.

    Raises:
        ValueError: shapes do not fit, or dtypes differ.
    """
    fits = row.ndim == col.ndim == 3 and value.ndim == 4
    fits = fits and row.shape[:2] == col.shape[:2] and value.shape[:3] == (row.shape[0], col.shape[2], row.shape[2])
    _check(fits, "row (B, Q, W), col (B, Q, H), value (B, H, W, e)", row, col, value)
    if is_tracing():
        columns = value.permute(0, 2, 3, 1)  # (B, W, e, H)
        sums = (row @ columns.flatten(2)).unflatten(2, columns.shape[2:])  # (B, Q, e, H)
        return (sums @ col.unsqueeze(3)).squeeze(3)
    if (result := _by_kernels(col, row, value, kernels)) is not None:
        return result
    if col.shape[2] > row.shape[2]:
        return _RowColumnProduct.apply(col, row, value.transpose(1, 2))
    return _RowColumnProduct.apply(row, col, value)


def _by_kernels(col: Tensor, row: Tensor, value: Tensor, kernels: str) -> Tensor | None:
    """Return either product, computed by Triton's kernels; None if PyTorch has to."""
    if not wants_triton(kernels):
        return None

    def run() -> Tensor:
        # Imported here, since Triton is optional.
        from enact_common.attention.kernels.row_column import product

        return product(col, row, value)

    return attempt("row-column products", kernels, reason_against_products(col, row, value), run)


def _check(fits: bool, expected: str, *tensors: Tensor) -> None:
    """Raise ValueError if shapes do not fit or dtypes differ."""
    if not fits:
        raise ValueError(f"expected {expected}, got {[tuple(tensor.shape) for tensor in tensors]}")
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise ValueError(f"expected the same dtype for all, got {[tensor.dtype for tensor in tensors]}")


def _spans(total: int, most: int) -> list[slice]:
    """Cut 0..total into the fewest spans of at most `most` (at least 1) elements; only the last may be shorter."""
    count = max(1, -(-total // max(1, most)))
    step = max(1, -(-total // count))
    return [slice(start, start + step) for start in range(0, total, step)]


def _cached(device: torch.device) -> bool:
    """Whether slices are kept in a cache, so that going over an intermediate again costs little."""
    return device.type == "cpu"


def _slices(device: torch.device, batch: int, length: int, elements: int) -> Iterator[tuple[slice, slice]]:
    """Cut (batch, length) into blocks that fit the device's slice size, with `elements` elements per place."""
    most = (CACHE_SLICE if _cached(device) else MEMORY_SLICE) // max(1, elements)
    for b in _spans(batch, most // max(1, length)):
        for part in _spans(length, most):
            yield b, part


class _ClusteredProduct(torch.autograd.Function):
    """`clustered_row_column_product` for H <= W, as (B, W, H, e).

    The result is row @ U, with U[m, (h, e)] = col[h, m] value[m, e]. Sliced by B and h.
    """

    @staticmethod
    def forward(ctx, col: Tensor, row: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(col, row, value)
        (batch, height, clusters), width, channels = col.shape, row.shape[1], value.shape[2]
        out = value.new_empty(batch, width, height, channels)
        with torch.autocast(col.device.type, enabled=False):
            for b, h in _slices(col.device, batch, height, clusters * channels):
                sums = row[b] @ _scale(col[b, h], value[b]).flatten(2)  # (b, W, h e)
                out[b, :, h] = sums.unflatten(2, (-1, channels))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        col, row, value = ctx.saved_tensors
        needs_col, needs_row, needs_value = ctx.needs_input_grad
        (batch, height, clusters), channels = col.shape, value.shape[2]
        grads = grad_col, grad_row, grad_value = [x.new_zeros(x.shape) for x in (col, row, value)]
        with torch.autocast(col.device.type, enabled=False):
            for b, h in _slices(col.device, batch, height, clusters * channels):
                grad_sums = grad[b, :, h].flatten(2)  # (b, W, h e)
                if needs_row:
                    grad_row[b].baddbmm_(grad_sums, _scale(col[b, h], value[b]).flatten(2).transpose(1, 2))
                if needs_col or needs_value:
                    grad_scaled = row[b].transpose(1, 2) @ grad_sums
                    grad_scaled = grad_scaled.unflatten(2, (-1, channels))  # (b, M, h, e)
                if needs_value:
                    grad_value[b] += (grad_scaled * col[b, h].transpose(1, 2).unsqueeze(3)).sum(2)
                if needs_col:
                    grad_col[b, h] = grad_scaled.mul_(value[b].unsqueeze(2)).sum(3).transpose(1, 2)
        return _needed(ctx, grads)


def _scale(col: Tensor, value: Tensor) -> Tensor:
    """Multiply values (b, M, e) by weights (b, h, M): (b, M, h, e)."""
    return col.transpose(1, 2).unsqueeze(3) * value.unsqueeze(2)


class _RowColumnProduct(torch.autograd.Function):
    """`row_column_product` for H <= W.

    The result is sum_h col[q, h] T[q, h], with T[q, (h, e)] = row @ value. Sliced by B and q.
    """

    @staticmethod
    def forward(ctx, row: Tensor, col: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(row, col, value)
        (batch, queries, _), height, channels = row.shape, value.shape[1], value.shape[3]
        out = value.new_empty(batch, queries, channels)
        with torch.autocast(row.device.type, enabled=False):
            columns = _by_column(value)  # (B, W, H e)
            for b, q in _slices(row.device, batch, queries, height * channels):
                sums = (row[b, q] @ columns[b]).unflatten(2, (height, channels))  # (b, q, H, e)
                out[b, q] = (col[b, q].unsqueeze(2) @ sums).squeeze(2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        row, col, value = ctx.saved_tensors
        needs_row, needs_col, needs_value = ctx.needs_input_grad
        (batch, queries, width), height, channels = row.shape, value.shape[1], value.shape[3]
        cached = _cached(row.device)
        grad_row, grad_col = row.new_empty(row.shape), col.new_empty(col.shape)
        grad_value = value.new_zeros(batch, width, height * channels)
        with torch.autocast(row.device.type, enabled=False):
            # (B, H W, e) or (B, W, H e)
            values = value.flatten(1, 2) if cached else _by_column(value)
            for b, q in _slices(row.device, batch, queries, height * max(channels, width if cached else 0)):
                part = row[b, q], col[b, q], values[b], grad[b, q]
                grad_sums = (col[b, q].unsqueeze(3) * grad[b, q].unsqueeze(2)).flatten(2)  # (b, q, H e)
                if needs_value:
                    grad_value[b].baddbmm_(row[b, q].transpose(1, 2), grad_sums)
                if needs_row or needs_col:
                    # By pair saves a matrix product, by sum visits fewer elements. By pair is faster in a cache, by
                    # sum where elements pass through memory.
                    grads = _weight_grads_by_pair(*part) if cached else _weight_grads_by_sum(*part, grad_sums)
                    grad_row[b, q], grad_col[b, q] = grads
        return _needed(ctx, (grad_row, grad_col, grad_value.unflatten(2, (height, channels)).transpose(1, 2)))


def _by_column(value: Tensor) -> Tensor:
    """Reorder (b, H, W, e) to (b, W, H e)."""
    return value.transpose(1, 2).flatten(2)


def _weight_grads_by_pair(row: Tensor, col: Tensor, values: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradients of the slices `row` and `col` through the gradient of their products; values: (b, H W, e)."""
    grad_pairs = grad @ values.transpose(1, 2)
    grad_pairs = grad_pairs.unflatten(2, (col.shape[2], row.shape[2]))  # (b, q, H, W)
    grad_row = (col.unsqueeze(2) @ grad_pairs).squeeze(2)
    return grad_row, grad_pairs.mul_(row.unsqueeze(2)).sum(3)


def _weight_grads_by_sum(
    row: Tensor, col: Tensor, values: Tensor, grad: Tensor, grad_sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Return gradients of the slices `row` and `col` through the rows' sums and their gradient grad_sums (b, q, H e).

    values: (b, W, H e).
    """
    sums = (row @ values).unflatten(2, (col.shape[2], -1))  # (b, q, H, e)
    grad_col = sums.mul_(grad.unsqueeze(2)).sum(3)
    return grad_sums @ values.transpose(1, 2), grad_col


def _needed(ctx, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return the required gradients, None for the others."""
    return tuple(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=True))
