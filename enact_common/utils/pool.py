"""Work on many items in one process per CPU core."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from enact_common.utils.signals import cancelling, end_with_parent

# From this many images on, starting the processes is worth it.
PARALLEL_FROM = 1000


@contextlib.contextmanager
def mapped(function: Callable[[Any], Any], items: Sequence[Any], parallel: bool) -> Iterator[Iterator[Any]]:
    """A block with the iterator of a function's results for items, in order, from a process per core if `parallel`."""
    if not parallel:
        yield map(function, items)
        return
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), start_process) as pool, cancelling(pool):
        yield pool.map(function, items, chunksize=max(min(len(items) // 64, 32), 1))


def start_process() -> None:
    """Prepare a pool process: one thread, since there is a process for each core."""
    # PyTorch reads the variable when it is imported.
    os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    end_with_parent()
