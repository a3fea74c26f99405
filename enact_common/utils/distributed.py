"""One process or many: start-up by torchrun, the main process, and the few collectives that are needed."""

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

# What gloo says, in errors of no kind of their own, where another process has gone.
GONE = re.compile(r"connection (closed|reset|refused)|broken pipe|timed out waiting|socket closed", re.IGNORECASE)


class SharedError(UserError):
    """A UserError that all processes raise, with the message of the first that had one."""


def init_distributed_mode(args: argparse.Namespace) -> argparse.Namespace:
    """Join the process group that torchrun describes in the environment; without one, this is the only process.

    What a scheduler says of its job (SLURM_NTASKS, ...) is not looked at: a job may hold several single processes.

    Returns:
        the arguments with `world_size`, and on GPUs with this process's own `device`.

    Raises:
        UserError: `--world_size` asks for more processes than were started, or this machine has fewer GPUs than
            processes.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        if args.world_size > 1:
            raise UserError(
                f"--world_size {args.world_size}: one process alone was started. Start all of them with "
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
    dist.init_process_group(
        backend,
        init_method=args.dist_url,
        world_size=world_size,
        rank=rank,
        timeout=timedelta(minutes=args.dist_timeout),
    )
    return argparse.Namespace(**{**vars(args), "world_size": world_size, "device": device})


def is_distributed() -> bool:
    """Whether this process is one of a group."""
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Processes in the group; 1 without one."""
    return dist.get_world_size() if is_distributed() else 1


def get_rank() -> int:
    """This process's number in the group, from 0."""
    return dist.get_rank() if is_distributed() else 0


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return get_rank() == 0


def all_reduce_mean(value: float, device) -> torch.Tensor:
    """The mean of a host number over all processes, float32 () on the device: nothing waits for it."""
    total = torch.full((), float(value), device=device)
    if is_distributed():
        dist.all_reduce(total)
    return total / get_world_size()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes."""
    if is_distributed():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def share_buffers(module: torch.nn.Module) -> None:
    """Let all processes' modules have the main process's buffers.

    Batch norms that train have met other images in each process. A checkpoint holds the main one's, so that is what an
    evaluation must be of.
    """
    if is_distributed():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def gather_objects(value: Any) -> list:
    """Every process's value (anything that pickles), in order of rank, in every process."""
    if not is_distributed():
        return [value]
    gathered: list = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


@contextmanager
def failing_together() -> Iterator[None]:
    """A block in which every process fails where one does. Inside, processes must not wait for one another.

    Raises:
        SharedError: one of the processes had a UserError. Without other processes, that error itself.
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
    """Whether an error says that another process of the group has gone or does not answer."""
    if not is_distributed():
        return False
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(GONE.search(str(error))))


def leave_process_group() -> None:
    """End this process's part in the group, if there is one; the others must do so, too."""
    if is_distributed():
        # The group's threads end with its last reference, and a model wrapped for it has one. Were they still there
        # when Python ends, one that lets go of a tensor then would abort the process.
        gc.collect()
        dist.destroy_process_group()


def abandon_process_group(status: int) -> None:
    """End this process at once with an exit status, if it is in a group; the others need not know.

    They may wait in the middle of a step. They notice when this process ends, but not if it waits for them.
    """
    if is_distributed():
        # What is left of loaders ends their processes.
        gc.collect()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not by Python's own end, which the group's threads may not survive (see `leave_process_group`).
        os._exit(status)
