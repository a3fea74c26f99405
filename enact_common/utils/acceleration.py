"""Settings that make a model fast or small on its device, without changing its results.

Modules declare what they support: a subclass of `Recomputed` can be recomputed in the backward pass, and `COMPILED`
names the methods that can be compiled.
"""

import argparse
import ctypes
import logging
import os
import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

logger = logging.getLogger("enact")

# `torch.compile`'s default backend.
BACKEND = "inductor"

# Compiled versions of one function, beyond which PyTorch runs it uncompiled; PyTorch's default is 8.
RECOMPILE_LIMIT = 64

# Trained batch norms, per process or synchronised.
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)

# Constants of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


class Recomputed(nn.Module):
    """A module that can recompute its activations in the backward pass instead of keeping them, if `recompute` is set.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
    """

    recompute = False

    def __call__(self, *args, **kwargs):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False, **kwargs)
        return super().__call__(*args, **kwargs)


def recompute_in_backward(function: Callable) -> Callable:
    """Return the function with its intermediates recomputed in the backward pass. It must not draw random numbers."""

    def run(*args):
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    return run


def prepare(model: nn.Module, args: argparse.Namespace, device: torch.device) -> None:
    """Move a model to its device, channels last, and apply `--checkpoint_activations` and `--compile`.

    The model is changed in place, with an unchanged state dict. This also changes settings of the whole process: on a
    CPU see `keep_freed_memory`, on a GPU see `prepare_gpu`, and with `--deterministic` see `compute_deterministically`.
    """
    if device.type == "cpu":
        keep_freed_memory()
    else:
        prepare_gpu(device)
    if args.deterministic:
        compute_deterministically()
    # Convolutions are fastest with channels last, on CPUs and on GPUs.
    model.to(device, memory_format=torch.channels_last)
    if args.checkpoint_activations:
        checkpoint_activations(model)
    if args.compile:
        compile_parts(model, device)


def prepare_gpu(device: torch.device) -> None:
    """Make a GPU the process's current device, and disable cuDNN's attention.

    cuDNN builds a plan for every new number of keys, and ENACT's number of clusters changes with nearly every batch.
    """
    if device.type != "cuda":
        return
    if device.index is not None:
        torch.cuda.set_device(device)
    torch.backends.cuda.enable_cudnn_sdp(False)


def compute_deterministically() -> None:
    """Make results on a GPU repeat bit for bit, as on a CPU: some steps take longer, others raise an error."""
    # cuBLAS reads the variable at its first use.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def keep_freed_memory() -> None:
    """Make this process keep freed memory, as PyTorch does on a GPU.

    glibc, the C library of most Linuxes, allocates every large tensor from the system and returns it when it is freed.
    The system clears the pages of each new tensor, which takes about a sixth of a training step on two cores. On other
    systems and with other allocators this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_TOP_PAD, 2**28)


def give_back_freed_memory() -> None:
    """Return the memory that `keep_freed_memory` kept to the system.

    Call it from time to time: batches of varying sizes fragment the kept memory, which would grow without limit.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def checkpoint_activations(model: nn.Module) -> None:
    """Make the model's encoder and decoder layers and the backbone's blocks keep only their inputs.

    Blocks with a trained batch norm keep all activations: recomputing them would update its statistics twice.
    """
    for module in model.modules():
        if isinstance(module, Recomputed):
            module.recompute = not any(isinstance(part, BATCH_NORMS) for part in module.modules())


def compile_parts(model: nn.Module, device: torch.device) -> None:
    """Compile the methods that modules name in `COMPILED`: the backbone, feed-forward networks, and decoder layers
    (except Anchor DETR's). The encoder's attention is not compiled: the number of clusters varies from step to step.

    Methods are compiled with dynamic shapes, for any size of image and batch. A method that cannot be compiled runs
    uncompiled; a warning says if nothing can be compiled on this machine.
    """
    try:
        with torch._dynamo.config.patch(suppress_errors=False):
            torch.compile(lambda x: x.sin() + 1, backend=BACKEND)(torch.zeros(4, device=device))
    except Exception as error:  # backends raise their own types for a missing or failing compiler
        cause = getattr(error, "inner_exception", error)
        reason = (str(cause).strip() or "no reason given").splitlines()[0]
        logger.warning("--compile: nothing can be compiled here (%s); continuing without it", reason)
        return
    config = torch._dynamo.config
    config.suppress_errors = True
    # Layers share their code and are compiled for training and evaluation, so they reach PyTorch's limit soon.
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # PyTorch 2.4
    setattr(config, limit, max(getattr(config, limit), RECOMPILE_LIMIT))
    for module in model.modules():
        for name in getattr(module, "COMPILED", ()):
            setattr(module, name, torch.compile(getattr(module, name), backend=BACKEND, dynamic=True))
