"""Attention as the original implementations compute it: with all its weights, and all that they multiply, in memory."""

import contextlib
from collections.abc import Iterator

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from enact_common.variants import load_variant


def naive_clustered(col: Tensor, row: Tensor, value: Tensor) -> Tensor:
    """`clustered_row_column_product` by its definition: every cell's weights over the clusters, times the values."""
    weights = (col.unsqueeze(2) * row.unsqueeze(1)).flatten(1, 2)  # (B, H W, M)
    return (weights @ value).unflatten(1, (col.shape[1], row.shape[1]))


def naive_row_column(row: Tensor, col: Tensor, value: Tensor) -> Tensor:
    """`row_column_product` as a matrix product and a sum, all queries at once."""
    sums = row @ value.transpose(1, 2).flatten(2)  # (B, Q, H e)
    return (sums.unflatten(2, value.shape[1::2]) * col.unsqueeze(3)).sum(2)


# By the names that `row_column_decoupled_attention` calls them by.
NAIVE_PRODUCTS = {"row_column_product": naive_row_column, "clustered_row_column_product": naive_clustered}


@contextlib.contextmanager
def eager_attention(variant: str) -> Iterator[None]:
    """Within it, a variant's attention stores its matrices; behind it, all is as it was.

    `scaled_dot_product_attention` is held to its unfused form, which stores queries times keys. Anchor DETR's products
    become those of their definitions. Weights and results are the same either way.

    Args:
        variant: a key of `VARIANTS`.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if variant == "anchor":
            module = load_variant("anchor").models.row_column_decoupled_attention
            for name, naive in NAIVE_PRODUCTS.items():
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, naive)
        yield
