"""What makes a model fast or small on its device, without changing what it computes.

A model's modules say what may be done with them: what derives from `Recomputed` can be computed again in the backward
pass, and `COMPILED` names the methods that can be compiled.
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

# What `torch.compile` calls its default.
BACKEND = "inductor"

# Compiled forms of one piece of code, beyond which PyTorch runs it uncompiled; its own limit is 8.
RECOMPILE_LIMIT = 64

# Norms that train, alone or with those of other processes.
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


class Recomputed(nn.Module):
    """A module that can give up what it would keep for the backward pass, and compute it anew there.

    Attributes:
        recompute: whether it does (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174).
    """

    recompute = False

    def __call__(self, *args, **kwargs):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False, **kwargs)
        return super().__call__(*args, **kwargs)


def recompute_in_backward(function: Callable) -> Callable:
    """The function, whose intermediates are computed again in the backward pass. It must not be random."""

    def run(*args):
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    return run


def prepare(model: nn.Module, args: argparse.Namespace, device: torch.device) -> None:
    """Move a model to its device, in the memory format and with the savings that the arguments ask for.

    Settings of the whole process change too: on a CPU it keeps the memory that it frees (`keep_freed_memory`), on a
    GPU see `prepare_gpu`, and with `--deterministic` see `compute_deterministically`.

    Args:
        model: a detector; changed in place, its state dict stays as it is.
        args: parsed arguments.
        device: where to.
    """
    if device.type == "cpu":
        keep_freed_memory()
    else:
        prepare_gpu(device)
    if args.deterministic:
        compute_deterministically()
    # Convolutions are fastest with channels innermost, on CPUs and GPUs alike.
    model.to(device, memory_format=torch.channels_last)
    if args.checkpoint_activations:
        checkpoint_activations(model)
    if args.compile:
        compile_parts(model, device)


def prepare_gpu(device: torch.device) -> None:
    """Make a GPU the process's own, and keep PyTorch from cuDNN's attention.

    cuDNN builds a plan for every new number of keys. With ENACT nearly every batch has another number of clusters.
    """
    if device.type != "cuda":
        return
    if device.index is not None:
        torch.cuda.set_device(device)
    torch.backends.cuda.enable_cudnn_sdp(False)


def compute_deterministically() -> None:
    """Let the process repeat its results to the bit on a GPU, as it does on a CPU anyway; some steps take longer.

    PyTorch raises an error in an operation that cannot be repeated.
    """
    # cuBLAS reads it when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


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


def give_back_freed_memory() -> None:
    """Hand what this process has freed back to the system, where it was told to keep it.

    Batches of many sizes leave holes of many sizes, which would add up without end: so, now and then.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def checkpoint_activations(model: nn.Module) -> None:
    """Let the model's encoder and decoder layers and the backbone's blocks keep their inputs alone.

    Blocks with a batch norm that trains keep all: computed twice, it would count a batch twice.
    """
    for module in model.modules():
        if isinstance(module, Recomputed):
            module.recompute = not any(isinstance(part, BATCH_NORMS) for part in module.modules())


def compile_parts(model: nn.Module, device: torch.device) -> None:
    """Compile what the model's modules name in `COMPILED`: the backbone, feed-forward networks, and decoder layers but
    for Anchor DETR's. The encoder's attention is left out: the number of clusters varies from step to step.

    Parts are compiled for any size of image and batch. If nothing can be compiled here, one line says so and the model
    runs uncompiled; so does a single part that cannot be compiled.
    """
    try:
        with torch._dynamo.config.patch(suppress_errors=False):
            torch.compile(lambda x: x.sin() + 1, backend=BACKEND)(torch.zeros(4, device=device))
    except Exception as error:  # a missing compiler, or one that fails, is a backend's own kind of exception
        cause = getattr(error, "inner_exception", error)
        reason = (str(cause).strip() or "no reason given").splitlines()[0]
        logger.warning("--compile: nothing can be compiled here (%s); going on without", reason)
        return
    config = torch._dynamo.config
    config.suppress_errors = True
    # Layers share their code: each is compiled for training and for evaluation, and past the limit none is any more.
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # PyTorch 2.4
    setattr(config, limit, max(getattr(config, limit), RECOMPILE_LIMIT))
    for module in model.modules():
        for name in getattr(module, "COMPILED", ()):
            setattr(module, name, torch.compile(getattr(module, name), backend=BACKEND, dynamic=True))
