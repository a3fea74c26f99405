"""Attention as in the original implementations, which keep all weights and products in memory."""

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from enact_common.variants import load_variant


def naive_clustered(col: Tensor, row: Tensor, value: Tensor) -> Tensor:
    """Compute `clustered_row_column_product` by its definition: each cell's weights over the clusters, times values."""
    weights = (col.unsqueeze(2) * row.unsqueeze(1)).flatten(1, 2)  # (B, H W, M)
    return (weights @ value).unflatten(1, (col.shape[1], row.shape[1]))


def naive_row_column(row: Tensor, col: Tensor, value: Tensor) -> Tensor:
    """Compute `row_column_product` as a matrix product and a sum, all queries at once."""
    sums = row @ value.transpose(1, 2).flatten(2)  # (B, Q, H * head_dim)
    return (sums.unflatten(2, value.shape[1::2]) * col.unsqueeze(3)).sum(2)


# The keys are the names used in `row_column_decoupled_attention`, which also passes its choice of kernels.
NAIVE_PRODUCTS = {
    "row_column_product": lambda row, col, value, kernels: naive_row_column(row, col, value),
    "clustered_row_column_product": lambda col, row, value, kernels: naive_clustered(col, row, value),
}


@contextlib.contextmanager
def eager_attention(variant: str) -> Iterator[None]:
    """Context in which a variant's attention keeps its matrices in memory.

    `scaled_dot_product_attention` uses its unfused backend, which stores queries times keys. Anchor DETR's products
    are computed by their definitions. Weights and results do not change.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if variant == "anchor":
            stack.enter_context(replaced(load_variant("anchor").models.row_column_decoupled_attention, NAIVE_PRODUCTS))
        yield


@contextlib.contextmanager
def replaced(module: ModuleType, functions: dict[str, Callable]) -> Iterator[None]:
    """Context in which attributes of a module are replaced; `functions` maps names to replacements."""
    originals = {name: getattr(module, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(module, name, function)
        yield
    finally:
        for name, function in originals.items():
            setattr(module, name, function)
