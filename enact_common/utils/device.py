"""Where a model runs: what `--device` and `--amp` ask for, and whether it is here."""

import re
import sys

import torch

from enact_common.utils.errors import UserError

TORCH_VERSION = tuple(map(int, torch.__version__.split(".")[:2]))


# Types that the message about a missing device lists, where they are there.
KINDS = ("cpu", "cuda", "mps", "xpu", "hpu")

# Type and number, as PyTorch spells a device.
NAME = re.compile(r"([a-z]+)(?::(0|[1-9]\d*))?")


def parse_device(name: str) -> tuple[str, int]:
    """The type and number that `--device` names, whether or not the device is here.

    Raises:
        UserError: no device has such a name.
    """
    match = NAME.fullmatch(name)
    try:
        # PyTorch knows the types; it takes cuda:300 for cuda:44, so the number is read here.
        torch.device(match[1] if match else name)
    except RuntimeError:
        match = None
    if match is None:
        raise UserError(f"--device {name}: not a device's name; use cuda, cuda:1 or cpu")
    return match[1], int(match[2] or 0)


def count_devices(kind: str) -> int:
    """How many devices of a type ("cuda", "mps", ...) PyTorch sees; 0 for "meta" and others that compute nothing."""
    if kind == "cpu":
        return 1
    backend = getattr(torch, kind, None)
    if not hasattr(backend, "device_count"):
        return 0
    available = getattr(backend, "is_available", None)  # PyTorch 2.4's torch.mps has none
    return backend.device_count() if available is None or available() else 0


def find_device(name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        UserError: there is no such device here; the message names those that are.
    """
    kind, index = parse_device(name)
    if index >= count_devices(kind):
        counts = {kind: count_devices(kind) for kind in KINDS}
        here = [k if count == 1 else f"{k}:{i}" for k, count in counts.items() for i in range(count)]
        way_out = "pass --device cpu" if len(here) == 1 else f"here are {', '.join(here)}: pass one of these"
        if kind == "cuda" and not counts["cuda"]:
            way_out += ", or check the driver and that PyTorch is a build for GPUs"
        raise UserError(f"--device {name}: PyTorch sees no such device here; {way_out}")
    return torch.device("cpu") if kind == "cpu" else torch.device(name)


def check_precision(amp: str, device: torch.device) -> None:
    """Refuse a precision that a device does not have.

    Raises:
        UserError: naming the ways out.
    """
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU: use --amp bf16 or none with --device cpu")


def default_device() -> str:
    """The name of the first GPU's device where PyTorch sees one, else the CPU's."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def start_counting_memory(device: torch.device) -> None:
    """Begin a new peak, where the device knows peaks: on CPUs, a process has one alone, from its start on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: what tensors took on a GPU, else what the process held in memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else greatest_resident()


def greatest_resident() -> int:
    """The most that this process ever held in memory, bytes; 0 where the system does not count."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    # macOS counts bytes, others KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


AMP_DTYPE = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str):
    """The mixed-precision context that `--amp` asks for."""
    return torch.autocast(device.type, dtype=AMP_DTYPE[amp], enabled=amp != "none")
