"""Distributed processes: start-up by torchrun, ranks, collectives, and errors in all processes."""

import argparse
import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from enact_common.utils.errors import UserError

# gloo's messages, in plain RuntimeErrors, when another process has ended.
GONE = re.compile(r"connection (closed|reset|refused)|broken pipe|timed out waiting|socket closed", re.IGNORECASE)


class SharedError(UserError):
    """A UserError that all processes raise, with the message of the first rank that had one."""


def init_distributed_mode(args: argparse.Namespace) -> argparse.Namespace:
    """Join the process group that torchrun describes in the environment; without one, run as a single process.

    Scheduler variables such as SLURM_NTASKS are ignored, because a job may hold several single processes. The returned
    arguments have `world_size`, and on GPUs the `device` of this process.

    Raises:
        UserError: `--world_size` asks for more processes than were started, or this machine has fewer GPUs than
            processes.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        if args.world_size > 1:
            raise UserError(
                f"--world_size {args.world_size}: only one process was started. Start all with "
                f"torchrun --nproc_per_node={args.world_size} <variant>/main.py ..."
            )
        return args
    rank, world_size, device = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), args.device
    backend = "gloo"
    if torch.device(args.device).type == "cuda":
        backend = "nccl"
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no GPU: PyTorch sees {torch.cuda.device_count()}; start as "
                "many processes as there are GPUs (torchrun --nproc_per_node=gpu)"
            )
        torch.cuda.set_device(local_rank)
        device = f"cuda:{local_rank}"
    timeout = timedelta(minutes=args.dist_timeout)
    dist.init_process_group(backend, args.dist_url, timeout, world_size=world_size, rank=rank)
    return argparse.Namespace(**{**vars(args), "world_size": world_size, "device": device})


def is_distributed() -> bool:
    """Whether this process is in a process group."""
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Return the number of processes in the group; 1 without a group."""
    return dist.get_world_size() if is_distributed() else 1


def get_rank() -> int:
    """Return this process's rank in the group, from 0; 0 without a group."""
    return dist.get_rank() if is_distributed() else 0


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return get_rank() == 0


def all_reduce_mean(value: float, device) -> torch.Tensor:
    """Return the mean of a host number over all processes, float32 () on the device, without a host wait."""
    total = torch.full((), float(value), device=device)
    if is_distributed():
        dist.all_reduce(total)
    return total / get_world_size()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all processes."""
    if is_distributed():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def share_buffers(module: torch.nn.Module) -> None:
    """Copy the main process's buffers to the modules of all processes.

    The statistics of trained batch norms differ between processes. Checkpoints hold those of the main process, so an
    evaluation must use them too.
    """
    if is_distributed():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def gather_objects(value: Any) -> list:
    """Return the values of all processes in rank order, in every process. Values must pickle."""
    if not is_distributed():
        return [value]
    gathered: list = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


@contextmanager
def failing_together() -> Iterator[None]:
    """A block in which all processes fail if one does. Inside, processes must not wait for one another.

    Raises:
        SharedError: a process raised a UserError. A single process raises the UserError itself.
    """
    error = None
    try:
        yield
    except UserError as own:
        if not is_distributed():
            raise
        error = own
    problems = gather_objects(None if error is None else str(error))
    first = next((problem for problem in problems if problem is not None), None)
    if first is not None:
        raise SharedError(first) from error


def lost_process(error: BaseException) -> bool:
    """Whether an error means that another process of the group has ended or does not answer."""
    if not is_distributed():
        return False
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(GONE.search(str(error))))


def leave_process_group() -> None:
    """Leave the process group, if there is one; all processes must call this."""
    if is_distributed():
        # A wrapped model keeps a reference to the group. Collect it, so that the group's threads end now: a thread
        # that frees a tensor while Python shuts down would abort the process.
        gc.collect()
        dist.destroy_process_group()


def abandon_process_group(status: int) -> None:
    """Exit at once with this status, if this process is in a group, without telling the others.

    The others may be waiting within a step. They notice the exit, but would hang if this process waited for them.
    """
    if is_distributed():
        # Collect data loaders, which ends their worker processes.
        gc.collect()
        sys.stdout.flush()
        sys.stderr.flush()
        # Skip Python's shutdown, in which the group's threads may abort the process (see `leave_process_group`).
        os._exit(status)
