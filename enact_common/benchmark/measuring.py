"""Measures time and memory of a computation, and describes the machine."""

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
    """Return a function that waits until the device has finished all its work; it does nothing on a CPU."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def take_turns(
    steps: dict[str, Callable[[], object]],
    repeat: int,
    synchronize: Callable[[], None] = lambda: None,
    warmup: int = 1,
) -> dict[str, list[float]]:
    """Time several steps by name, in turns so that drift of the machine affects all of them equally.

    Args:
        steps: name to the function to time.
        repeat: timed runs of each step.
        synchronize: waits until the device has finished.
        warmup: untimed runs of each step before.

    Returns:
        name to the seconds of each timed run.
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
    """Return `median`, `least` and `most` of at least one value."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


class MemoryMeter:
    """Meter of the peak memory since its construction: of tensors on a GPU, of the resident process on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            # Exclude memory that an earlier computation left in the allocator.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            forget_peak()
            self.before = peak_resident()

    def read(self) -> dict[str, int | None]:
        """Return bytes: `peak`; `rise`, peak minus the memory at construction; `reserved`, the peak reserved by
        PyTorch's GPU allocator, None on a CPU."""
        on_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else peak_resident()
        reserved = torch.cuda.max_memory_reserved(self.device) if on_gpu else None
        return {"peak": peak, "rise": peak - self.before, "reserved": reserved}


def forget_peak() -> None:
    """Reset the peak resident memory if Linux allows it; elsewhere an earlier peak may hide a later one."""
    # Otherwise the computation could reuse freed memory, which is still resident, without raising the peak.
    give_back_freed_memory()
    file = Path("/proc/self/clear_refs")
    if sys.platform == "linux" and file.exists():
        file.write_text("5")


def peak_resident() -> int:
    """Return this process's peak resident memory, bytes."""
    peak = proc_bytes("/proc/self/status", "VmHWM")
    return greatest_resident() if peak is None else peak


def machine(device: torch.device) -> str:
    """Return a description of the machine: CPU, threads, PyTorch version, and the GPU if `device` is one."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    text = f"{cpu}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, PyTorch {torch.__version__}"
    return text + (f", on {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "")
