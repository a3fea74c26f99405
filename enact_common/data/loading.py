"""Data loaders for training and evaluation: samplers, worker processes, and messages about their death."""

import atexit
import itertools
import os
import signal
from collections.abc import Iterator
from functools import partial

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from enact_common.data.coco import CocoDetection, collate
from enact_common.utils.distributed import get_rank, get_world_size
from enact_common.utils.signals import SIGNALS

# PyTorch's name for a worker process in its error about a dead one.
WORKER = "DataLoader worker"


class TrainSampler(DistributedSampler):
    """A sampler of this rank's share of an epoch's images, in an order that depends only on the seed and the epoch.

    The global batches do not depend on the number of ranks.

    Attributes:
        first: number of items to skip at the start of the share, for a resumed epoch.
    """

    def __init__(self, dataset: CocoDetection, seed: int):
        super().__init__(dataset, get_world_size(), get_rank(), shuffle=True, seed=seed)
        self.first = 0

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(super().__iter__(), self.first, None)


class EvaluationBatches(Sampler):
    """A batch sampler that deals batches of consecutive images to the ranks in turn; each image comes once.

    The batches equal those of a single process. So metrics do not depend on the number of ranks, even if a model's
    result for an image depends on its batch, as with ENACT's windows. Ranks can have different numbers of batches, or
    none.
    """

    def __init__(self, size: int, batch_size: int):
        self.size = size
        self.batch_size = batch_size
        self._starts = range(get_rank() * batch_size, size, get_world_size() * batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self._starts:
            yield list(range(start, min(start + self.batch_size, self.size)))

    def __len__(self) -> int:
        return len(self._starts)


def make_loader(dataset: CocoDetection, args, device: torch.device, train: bool) -> DataLoader:
    """A data loader whose order depends only on the seed and the epoch.

    For training, it shuffles, and drops an incomplete last batch. `device` is where the batches go.
    """
    if train:
        order = {
            "sampler": TrainSampler(dataset, args.seed), "batch_size": args.batch_size, "drop_last": True,
        }  # fmt: skip
    else:
        order = {"batch_sampler": EvaluationBatches(len(dataset), args.batch_size)}
    return DataLoader(
        dataset,
        **order,
        num_workers=args.num_workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        persistent_workers=args.num_workers > 0,
        worker_init_fn=partial(init_worker, running=_running_flag()),
        # With the default generator, iterating would change dropout's random numbers.
        generator=torch.Generator(),
    )


def init_worker(worker: int, running: Tensor) -> None:
    """Initialise a loader's worker process.

    OpenCV uses one thread, because the workers already run in parallel. Schedulers send stop signals to all processes
    of a run, but the run finishes its step first and needs its images. So a worker ignores these signals until its run
    ends and sets `running`, uint8 () in shared memory, to 0.
    """
    cv2.setNumThreads(0)
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # At its exit, Python ends remaining workers with SIGTERM, so the worker must obey it then.
    signal.signal(signal.SIGTERM, lambda number, frame: None if running.item() else os._exit(0))


_flag: Tensor | None = None


def _running_flag() -> Tensor:
    """The flag that tells workers whether this process still runs, shared by all loaders."""
    global _flag
    if _flag is None:
        _flag = torch.ones((), dtype=torch.uint8).share_memory_()
        # Python runs exit handlers in reverse order, so this one runs before the workers are ended.
        atexit.register(_flag.zero_)
    return _flag


def worker_death(error: BaseException) -> str | None:
    """A message on why a loader's worker process died and what helps; None for any other error.

    PyTorch raises this error at an arbitrary point in the main process.
    """
    if not (isinstance(error, RuntimeError) and WORKER in str(error)):
        return None
    # If the worker was killed, the cause of this error says so.
    text = f"{error}\n{error.__cause__ or ''}"
    reason = next((line for line in text.splitlines() if "killed by signal" in line), str(error).splitlines()[0])
    cause, way_out = "the lines above may say why", "Pass --num_workers 0 to load in the main process, which shows more"
    if "Killed" in text:
        cause = "probably out of memory"
        way_out = "Use fewer --num_workers, a smaller --batch_size, or no --cache_mode"
    elif "Bus error" in text or "shared memory" in text:
        cause = "probably too little shared memory"
        way_out = "Give the container more (docker run --shm-size, SHM_SIZE), or pass --num_workers 0"
    return f"an image-loading process died: {reason.strip()} ({cause}). {way_out}"
