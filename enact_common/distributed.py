"""One process or many: start-up by torchrun, the main process, and the few collectives that are needed."""

import os
from typing import Any

import torch
import torch.distributed as dist

from enact_common.errors import UserError


def init_distributed_mode(args) -> None:
    """Join the process group that torchrun describes in the environment; without one, this is the only process.

    Sets `args.distributed`, `args.rank` and `args.world_size`, and on GPUs `args.device` to this process's own.

    Raises:
        UserError: `--world_size` asks for more processes than were started.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        if args.world_size > 1:
            raise UserError(
                f"--world_size {args.world_size}: one process alone was started. Start all of them with "
                f"torchrun --nproc_per_node={args.world_size} <variant>/main.py ..."
            )
        args.distributed, args.rank = False, 0
        return
    args.distributed = True
    args.rank, args.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "gloo"
    if torch.device(args.device).type == "cuda":
        backend = "nccl"
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        torch.cuda.set_device(local_rank)
        args.device = f"cuda:{local_rank}"
    dist.init_process_group(backend, init_method=args.dist_url, world_size=args.world_size, rank=args.rank)


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


def world_mean(value: float, device) -> torch.Tensor:
    """The mean of a host number over all processes, float32 () on the device: nothing waits for it."""
    total = torch.full((), float(value), device=device)
    if is_distributed():
        dist.all_reduce(total)
    return total / get_world_size()


def world_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes."""
    if is_distributed():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value: Any) -> list:
    """Every process's value (anything that pickles), in order of rank, in every process."""
    if not is_distributed():
        return [value]
    gathered: list = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
