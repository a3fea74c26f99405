"""Devices and precision: `--device`, `--amp`, and peak memory."""

import re
import sys

import torch

from enact_common.utils.errors import UserError

TORCH_VERSION = tuple(map(int, torch.__version__.split(".")[:2]))


# Device types that the message about a missing device lists, if they are present.
KINDS = ("cpu", "cuda", "mps", "xpu", "hpu")

# PyTorch's device names: type and index.
NAME = re.compile(r"([a-z]+)(?::(0|[1-9]\d*))?")


def parse_device(name: str) -> tuple[str, int]:
    """Return the type and index that `--device` names; the device need not be present.

    Raises:
        UserError: the name is not a device's.
    """
    match = NAME.fullmatch(name)
    try:
        # Only the type: PyTorch reads cuda:300 as cuda:44, so the index is parsed here.
        torch.device(match[1] if match else name)
    except RuntimeError:
        match = None
    if match is None:
        raise UserError(f"--device {name}: not a device's name; use cuda, cuda:1 or cpu")
    return match[1], int(match[2] or 0)


def count_devices(kind: str) -> int:
    """Return the number of devices of a type ("cuda", "mps", ...); 0 for types that cannot compute, such as "meta"."""
    if kind == "cpu":
        return 1
    backend = getattr(torch, kind, None)
    if not hasattr(backend, "device_count"):
        return 0
    available = getattr(backend, "is_available", None)  # PyTorch 2.4's torch.mps has none
    return backend.device_count() if available is None or available() else 0


def find_device(name: str) -> torch.device:
    """Return the device that `--device` names.

    Raises:
        UserError: there is no such device on this machine; the message lists the devices.
    """
    kind, index = parse_device(name)
    if index >= count_devices(kind):
        counts = {kind: count_devices(kind) for kind in KINDS}
        here = [k if count == 1 else f"{k}:{i}" for k, count in counts.items() for i in range(count)]
        way_out = "pass --device cpu" if len(here) == 1 else f"here are {', '.join(here)}: pass one of these"
        if kind == "cuda" and not counts["cuda"]:
            way_out += ", or check the driver and that PyTorch is built for GPUs"
        raise UserError(f"--device {name}: PyTorch sees no such device here; {way_out}")
    return torch.device("cpu") if kind == "cpu" else torch.device(name)


def check_precision(amp: str, device: torch.device) -> None:
    """Refuse a precision that the device does not support."""
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU: use --amp bf16 or none with --device cpu")


def default_device() -> str:
    """Return "cuda" if PyTorch sees a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def start_counting_memory(device: torch.device) -> None:
    """Reset the peak memory on a GPU. On a CPU the peak always counts from the start of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of tensors on a GPU, else of the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else greatest_resident()


def greatest_resident() -> int:
    """Return the peak resident memory of this process in bytes; 0 if the system does not report it."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    # macOS counts bytes, others KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


AMP_DTYPE = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str):
    """Return the mixed-precision context of `--amp`."""
    return torch.autocast(device.type, dtype=AMP_DTYPE[amp], enabled=amp != "none")
