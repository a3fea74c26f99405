"""Where a model runs: what `--device` and `--amp` ask for, and whether it is here."""

import torch

from enact_common.errors import UserError


def find_device(name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        UserError: there is no such device here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: not a device's name; use cuda, cuda:1 or cpu") from error
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
