"""Attention to packed windows: their number stays on the GPU, so that the host never waits for it.

The rows of all images' windows lie side by side in tensors of a known size. Fused kernels read from the GPU where each
image's rows begin. This costs memory, and the windows must fit the rows; where they do not, the pass is wrong and has
to be repeated without packing. So layers pack only within `packed_windows`, whose caller has to look.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels import TRITON, attempt

_overflows: ContextVar[list[Tensor] | None] = ContextVar("overflows", default=None)

# Its name in `failed_kernels`.
PACKED_ATTENTION = "packed attention"

# The kinds of inputs whose backward kernels have run once.
_checked: set[tuple] = set()


@contextlib.contextmanager
def packed_windows() -> Iterator[list[Tensor]]:
    """Context in which layers leave the number of windows on the GPU, where Triton's kernels make the windows.

    Yields a list to which each such layer appends an int32 tensor (): 1 if its windows did not fit, else 0. If one is 1
    when the context ends, all results and gradients have to be computed again outside of it, by all processes that
    train together. Layers in the context cannot be recomputed in the backward pass (activation checkpointing).
    """
    token = _overflows.set([])
    try:
        yield _overflows.get()
    finally:
        _overflows.reset(token)


def is_packing() -> bool:
    """Whether layers may pack windows."""
    return _overflows.get() is not None


def note_overflow(overflow: Tensor) -> None:
    """Append a layer's overflow to the list of `packed_windows`."""
    _overflows.get().append(overflow)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, dropout: float, scale: float) -> Tensor:
    """Attend from the queries of each image to its own windows.

    Args:
        q: (batch, L, heads, head_dim).
        k, v: (rows, heads, head_dim), packed.
        starts: int32 (batch + 1,), the first row of each image, and the row behind the last. Rows from there on are
            not attended to.
        dropout: probability of dropping an attention weight.
        scale: of the logits.

    Returns:
        (batch, L, heads, head_dim).
    """
    if takes_packed(q):
        attended = attempt(PACKED_ATTENTION, TRITON, None, lambda: try_fused(q, k, v, starts, dropout, scale))
        if attended is not None:
            return attended
    batch, rows = len(q), int(starts[1])
    q, k, v = (x.transpose(1, 2) for x in (q, *(x[: batch * rows].unflatten(0, (batch, rows)) for x in (k, v))))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale).transpose(1, 2)


def takes_packed(q: Tensor) -> bool:
    """Whether fused kernels can be tried. Without them, the host waits for the number of windows."""
    return q.is_cuda


def try_fused(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, dropout: float, scale: float) -> Tensor:
    """Return the result of `fused_attention`, after a trial of its backward pass for each new kind of input.

    `packed_attention` can still choose another way after a forward pass that fails, but not after a backward pass. The
    trial is without dropout, which would draw random numbers.
    """
    kind = q.device, q.dtype, q.shape[2:]
    if torch.is_grad_enabled() and kind not in _checked:
        trial = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.autograd.grad(fused_attention(*trial, starts, 0.0, scale).sum(), trial)
        _checked.add(kind)
    return fused_attention(q, k, v, starts, dropout, scale)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, dropout: float, scale: float) -> Tensor:
    """Compute `packed_attention` without reading `starts` on the host."""
    batch, length = q.shape[:2]
    queries = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=q.device)
    most = length, len(k) // batch
    k, v = _WithinRows.apply(k, v, starts)
    return attend_sequences(q.flatten(0, 1), k, v, queries, starts, most, dropout, scale).view(q.shape)


def attend_sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    most: tuple[int, int],
    dropout: float,
    scale: float,
) -> Tensor:
    """Attend within sequences that lie side by side, with the kernels behind `scaled_dot_product_attention`.

    They are flash attention in 16 bits, and memory-efficient attention in float32. PyTorch's public functions for such
    sequences have no dropout, or cost the host more than the wait that packing saves.

    Args:
        q, k, v: (rows, heads, head_dim).
        q_starts, k_starts: int32 (batch + 1,), the first row of each sequence, and the row behind the last.
        most: limits of the number of a sequence's rows in `q`, and in `k` and `v`.
    """
    if q.dtype == torch.float32:
        inputs = (q[None], k[None], v[None], None, q_starts, k_starts, *most, dropout, 0, True)
        return torch.ops.aten._efficient_attention_forward(*inputs, scale=scale)[0].squeeze(0)
    inputs = (q, k, v, q_starts, k_starts, *most, dropout, False, False)
    return torch.ops.aten._flash_attention_forward(*inputs, scale=scale)[0]


class _WithinRows(torch.autograd.Function):
    """Keys and values (rows, heads, head_dim) as they are, with zero gradients behind the last image's rows.

    Fused kernels do not write the gradients of these rows. What lies there, NaN perhaps, must not reach the weights.
    """

    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(starts)
        return k.view_as(k), v.view_as(v)

    @staticmethod
    def backward(ctx, k_grad: Tensor, v_grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (starts,) = ctx.saved_tensors
        behind = (torch.arange(len(k_grad), device=starts.device) >= starts[-1])[:, None, None]
        return k_grad.masked_fill(behind, 0), v_grad.masked_fill(behind, 0), None
