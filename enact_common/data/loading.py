"""Batches for training and evaluation: which images a process gets, in which order, and who loads them."""

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

# What PyTorch calls a worker process, where one has died.
WORKER = "DataLoader worker"


class TrainSampler(DistributedSampler):
    """A process's share of an epoch's images: a new order in each epoch, of the seed alone.

    The images of a batch of all processes together are the same whatever the number of processes. The share can begin
    anywhere, as in an epoch that was stopped half-way.

    Args:
        dataset: of all processes.
        seed: of the order, with the epoch (`set_epoch`).

    Attributes:
        first: items of the share that are left out at its beginning.
    """

    def __init__(self, dataset: CocoDetection, seed: int):
        super().__init__(dataset, get_world_size(), get_rank(), shuffle=True, seed=seed)
        self.first = 0

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(super().__iter__(), self.first, None)


class EvaluationBatches(Sampler):
    """Whole batches of neighbouring images, dealt out to the processes in turn, each image once.

    Batches are those of a single process: where what a model makes of an image depends on its batch, as with ENACT's
    windows, the figures do not depend on the number of processes. Processes can have different numbers of batches, or
    none.

    Args:
        size: images of all processes.
        batch_size: images a batch; the last one can have less.
    """

    def __init__(self, size: int, batch_size: int):
        self.size = size
        self.batch_size = batch_size
        self._begins = range(get_rank() * batch_size, size, get_world_size() * batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for begin in self._begins:
            yield list(range(begin, min(begin + self.batch_size, self.size)))

    def __len__(self) -> int:
        return len(self._begins)


def make_loader(dataset: CocoDetection, args, device: torch.device, train: bool) -> DataLoader:
    """Batches of a data set, in an order that depends on the seed and the epoch alone.

    Args:
        dataset: of this process's images and those of the others.
        args: parsed arguments.
        device: where the batches will go.
        train: shuffle, and leave a last batch that is not full out.
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
        worker_init_fn=partial(begin_worker, at_work=_at_work()),
        # Its own, so that iterating draws nothing from the generator that dropout uses.
        generator=torch.Generator(),
    )


def begin_worker(worker: int, at_work: Tensor) -> None:
    """Prepare a loader's worker process.

    OpenCV keeps to one thread, as the workers are the parallelism. The signals that ask a run to stop go to all of its
    processes where a scheduler sends them, and the step that the run then finishes still needs its images. So a worker
    overhears them, until its run ends.

    Args:
        worker: its number.
        at_work: uint8 (), shared with the main process, which makes it 0 when it ends.
    """
    cv2.setNumThreads(0)
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # This one is also how Python ends the workers that are left at its own end.
    signal.signal(signal.SIGTERM, lambda number, frame: None if at_work.item() else os._exit(0))


_flag: Tensor | None = None


def _at_work() -> Tensor:
    """The flag that tells this process's workers whether it is at work: one for all loaders."""
    global _flag
    if _flag is None:
        _flag = torch.ones((), dtype=torch.uint8).share_memory_()
        # Python runs what is registered last first, so this comes before it ends the workers.
        atexit.register(_flag.zero_)
    return _flag


def worker_death(error: BaseException) -> str | None:
    """What became of a loader's worker process, and what helps; None where the error is another one.

    PyTorch raises the error wherever the main process is at that moment.
    """
    if not (isinstance(error, RuntimeError) and WORKER in str(error)):
        return None
    # Where one was killed, the error that says so is behind this one.
    text = f"{error}\n{error.__cause__ or ''}"
    reason = next((line for line in text.splitlines() if "killed by signal" in line), str(error).splitlines()[0])
    cause, way_out = "why, the lines before may say", "--num_workers 0 loads in the main process, which shows more"
    if "Killed" in text:
        cause = "the system kills what takes too much memory"
        way_out = "fewer --num_workers, a smaller --batch_size, or no --cache_mode need less"
    elif "Bus error" in text or "shared memory" in text:
        cause = "too little shared memory, most likely"
        way_out = "give the container more (docker run --shm-size, SHM_SIZE), or pass --num_workers 0"
    return f"a process that loads images has died: {reason.strip()} ({cause}). {way_out}"
