"""Optional Triton kernels for ENACT's clusters and for row-column products, and the choice between them and PyTorch.

This folder imports PyTorch and, only when kernels run, Triton. Without Triton everything runs in PyTorch.
"""

import logging
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import _StopRecomputationError

from ..tracing import is_tracing

# Values of `kernels`: "auto" is `AUTO_CHOICE`; "triton" runs in PyTorch what the kernels do not cover.
KERNELS = AUTO, TORCH, TRITON = ("auto", "torch", "triton")

# No GPU has run the kernels yet (docs/dev/kernels.md).
AUTO_CHOICE = TORCH

# dtypes that the kernels load. Float64 is for tests, and sums would lose its precision.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The widest tokens, whose tile is two tokens high.
MOST_CHANNELS = 2048

# The widest values of a row-column product, whose tiles fit the registers.
MOST_HEAD_DIM = 128

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

# Messages already logged, and names of kernels that failed, in this process.
_logged: set[str] = set()
_failed: set[str] = set()


def check_kernels(kernels: str) -> str:
    """Return `kernels`, one of `KERNELS`.

    Raises:
        ValueError: it is another value.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, got {kernels!r}")
    return kernels


def wants_triton(kernels: str) -> bool:
    """Whether a layer with this setting runs the kernels where they cover its inputs."""
    # Graphs hold PyTorch's operations only; `torch.compile` writes its own kernels.
    return TRITON in (kernels, AUTO_CHOICE if kernels == AUTO else TORCH) and not (
        is_tracing() or torch.compiler.is_compiling()
    )


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on a CPU, as in the tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def reason_against(tensors: Sequence[Tensor]) -> str | None:
    """Return why the kernels cannot run on these tensors, in any layer; None if they can."""
    device = tensors[0].device
    if device.type != "cuda" and not (device.type == "cpu" and is_interpreted()):
        return f"they run on GPUs, not on {device.type}"
    if any(tensor.dtype not in DTYPES for tensor in tensors):
        return f"no support for {', '.join(sorted({str(t.dtype) for t in tensors if t.dtype not in DTYPES}))}"
    if any(tensor.numel() == 0 for tensor in tensors):
        return "an input is empty"
    if not all(map(fits_int32, tensors)):
        return "an input has more than 2^31 elements"
    return None


def reason_against_pooling(*tensors: Tensor) -> str | None:
    """Return why the kernels cannot pool these tensors: scored tokens, a copy of them, others; None if they can.

    The last tensor can also be (batch, W), the scores of a map's columns.
    """
    of_map = tensors[-1].ndim == 2
    tokens = tensors[:-1] if of_map else tensors
    if len(tensors) != 3 or tensors[0].ndim != 3 or len({tensor.shape for tensor in tokens}) > 1:
        return "they pool two tensors of one shape (batch, N, d)"
    width = tensors[-1].shape[1]
    if of_map and width + tensors[0].shape[1] // max(width, 1) > MOST_CHANNELS:
        return f"they pool maps of at most {MOST_CHANNELS} columns and rows"
    if tensors[0].shape[2] > MOST_CHANNELS:
        return f"they pool at most {MOST_CHANNELS} channels"
    return reason_against(tensors)


def reason_against_products(*tensors: Tensor) -> str | None:
    """Return why the kernels cannot compute row-column products of these tensors, values last; None if they can."""
    if tensors[-1].shape[-1] > MOST_HEAD_DIM:
        return f"they multiply at most {MOST_HEAD_DIM} channels"
    return reason_against(tensors)


def fits_int32(tensor: Tensor) -> bool:
    """Whether a tensor's elements can be addressed by int32 offsets."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) < 2**31


def attempt(name: str, kernels: str, reason: str | None, run: Callable[[], Result]) -> Result | None:
    """Run kernels; return None if the caller has to use PyTorch instead. Log one line about a failure.

    Args:
        name: what the kernels compute. After one failure, kernels of the same name are not tried again.
        kernels: the layer's setting. The reason is logged, once, only if it asks for the kernels by name.
        reason: why the kernels do not cover the inputs; None if they do.
        run: launches the kernels.
    """
    if reason is None and name not in _failed:
        try:
            return run()
        except (torch.cuda.OutOfMemoryError, _StopRecomputationError):
            # Activation checkpointing ends a recomputation by an error.
            raise
        except Exception as error:
            _failed.add(name)
            text = (str(error).strip() or "no message").splitlines()[0]
            _log_once(f"{name}: the GPU kernels failed, PyTorch takes over ({type(error).__name__}: {text})")
    elif reason is not None and kernels == TRITON:
        _log_once(f"{name}: PyTorch instead of Triton kernels, since {reason}")
    return None


def failed_kernels() -> frozenset[str]:
    """Return the names of kernels that failed in this process."""
    return frozenset(_failed)


def _log_once(message: str) -> None:
    """Log a warning, unless the same one was logged before."""
    if message not in _logged:
        _logged.add(message)
        logger.warning("%s", message)
