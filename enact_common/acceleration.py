"""What makes a model fast or small on its device, without changing what it computes."""

import argparse
import ctypes
import sys

import torch
from torch import nn


def prepare(model: nn.Module, args: argparse.Namespace, device: torch.device) -> None:
    """Move a model to its device, in the memory format and with the savings that the arguments ask for.

    Args:
        model: a detector; changed in place, its state dict stays as it is.
        args: parsed arguments.
        device: where to.
    """
    if device.type == "cpu":
        keep_freed_memory()
    # Convolutions are fastest with channels innermost, on CPUs and GPUs alike.
    model.to(device, memory_format=torch.channels_last)


# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, as PyTorch does on a GPU.

    The C library of most Linuxes asks the system for every large tensor and hands it back when it is freed. Each then
    comes in new pages, all of which the system clears: about a sixth of a training step on two cores. Elsewhere, and
    under another allocator, this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_TOP_PAD, 2**28)
