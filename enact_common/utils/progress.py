"""A progress line on the terminal."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta

from tqdm import tqdm

from enact_common.utils.distributed import is_main_process

logger = logging.getLogger("enact")


class Progress:
    """An iterator with a progress bar on a terminal, or a line every few steps elsewhere; only the main process prints.

    Args:
        batches: the batches to iterate over; must have a length.
        title: start of each line.
        images_per_step: images of all processes, for the rate.
        print_freq: steps between two lines.
        first: steps that were done before a resume; the batches are the remaining ones.
    """

    def __init__(self, batches: Iterable, title: str, images_per_step: int, print_freq: int, first: int = 0):
        self.batches = batches
        self.title = title
        self.images_per_step = images_per_step
        self.print_freq = print_freq
        self.first = first

    def __iter__(self) -> Iterator[tuple[int, object]]:
        """Yield (step, batch), with steps counted from `first`."""
        self._start = time.perf_counter()
        self._bar = tqdm(
            total=len(self.batches), initial=self.first, desc=self.title, unit="step", file=sys.stdout,
            disable=not (sys.stdout.isatty() and is_main_process()), dynamic_ncols=True,
        )  # fmt: skip
        with self._bar:
            for step, batch in enumerate(self.batches, start=self.first):
                yield step, batch
                self._bar.update()

    def due(self, step: int) -> bool:
        """Whether `show` should print in this step. Ask first, because computing the values may wait for the device."""
        return (step + 1) % self.print_freq == 0 or step + 1 == len(self.batches)

    def show(self, step: int, values: dict[str, float]) -> None:
        """Print values, with the rate and the remaining time."""
        text = "".join(f"{name} {value:.4g}  " for name, value in values.items())
        done, elapsed = step + 1 - self.first, time.perf_counter() - self._start
        rate = done * self.images_per_step / elapsed
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{text}{rate:.1f} images/s", refresh=False)
            return
        remaining = timedelta(seconds=round(elapsed / done * (len(self.batches) - step - 1)))
        width = len(str(len(self.batches)))
        logger.info(
            "%s [%*d/%d]  %s%.1f images/s  %s left",
            self.title, width, step + 1, len(self.batches), text, rate, remaining,
        )  # fmt: skip
