"""Where a model runs: what `--device` and `--amp` ask for, and whether it is here."""

import sys

import torch

from enact_common.errors import UserError

TORCH_VERSION = tuple(map(int, torch.__version__.split(".")[:2]))


def parse_device(name: str) -> torch.device:
    """The device that `--device` names, be it here or not.

    Raises:
        UserError: no device has such a name.
    """
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: not a device's name; use cuda, cuda:1 or cpu") from error


def find_device(name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        UserError: there is no such device here.
    """
    device = parse_device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: PyTorch sees no GPU here; pass --device cpu, or check the driver")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} GPUs here")
    return device


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
