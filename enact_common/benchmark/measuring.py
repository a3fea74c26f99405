"""Time and memory of a computation, and the machine it ran on."""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from enact_common.benchmark.isolated import proc_bytes
from enact_common.utils.acceleration import give_back_freed_memory
from enact_common.utils.device import greatest_resident


def synchronizer(device: torch.device) -> Callable[[], None]:
    """What waits until a device has done all that it was given."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def take_turns(
    steps: dict[str, Callable[[], object]],
    repeat: int,
    synchronize: Callable[[], None] = lambda: None,
    warmup: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each step's runs, after some to warm up; the steps take turns, so that drift hits all alike.

    Args:
        steps: what to run, by name.
        repeat: timed runs of each.
        synchronize: waits until a step is really done.
        warmup: runs of each before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warmup + repeat):
        for name, step in steps.items():
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """`median`, `least` and `most` of some values, of which there is at least one."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


class MemoryMeter:
    """The greatest memory from its construction on: on a GPU what tensors take there, else the process's resident one.

    Args:
        device: where the computation is.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            # What an earlier computation left in the allocator is not this one's.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            forget_peak()
            self.before = peak_resident()

    def read(self) -> dict[str, int | None]:
        """Bytes: `peak`; `rise`, by how much that is above what there was before; `reserved`, the most that PyTorch's
        allocator took from the GPU, None on a CPU."""
        on_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else peak_resident()
        reserved = torch.cuda.max_memory_reserved(self.device) if on_gpu else None
        return {"peak": peak, "rise": peak - self.before, "reserved": reserved}


def forget_peak() -> None:
    """Count the peak resident memory anew, where Linux lets us; elsewhere an earlier peak may hide a later one."""
    # What is free but not yet given back would be used again unnoticed.
    give_back_freed_memory()
    file = Path("/proc/self/clear_refs")
    if sys.platform == "linux" and file.exists():
        file.write_text("5")


def peak_resident() -> int:
    """This process's peak resident memory, bytes."""
    peak = proc_bytes("/proc/self/status", "VmHWM")
    if peak is not None:
        return peak
    return greatest_resident()


def machine(device: torch.device) -> str:
    """The machine in words, with the GPU where the device is one."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    text = f"{cpu}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, PyTorch {torch.__version__}"
    return text + (f", on {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "")
