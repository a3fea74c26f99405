"""Atomic writing of files, and safe reading of tensor files from any source."""

import argparse
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from enact_common.utils.errors import UserError
from enact_common.utils.file_kinds import describe_file, describe_folder, is_safetensors

# Checkpoints of the original repositories hold a Namespace; otherwise only tensors and built-in types are allowed.
torch.serialization.add_safe_globals([argparse.Namespace])

# The class or function in PyTorch's message that it refused.
REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def make_folder(folder: Path, flag: str = "--output_dir") -> None:
    """Create a folder, which a flag names, and its parents, if they are missing.

    Raises:
        UserError: the folder cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be created ({error.strerror}); choose another folder") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{flag} {folder}: cannot be written to; choose another folder")


def check_no_folder(path: Path) -> None:
    """Refuse an output file whose path is a folder, before any work is done."""
    if path.is_dir():
        raise UserError(f"{path}: cannot be written, there is a folder of this name; choose another path")


def write_atomically(path: Path, write: Callable[[BinaryIO], object], sync: bool = True) -> None:
    """Write to a temporary file next to `path` and rename it, so that `path` is always a complete file, old or new.

    Args:
        path: the file to create or replace.
        write: writes the content to an open binary file.
        sync: wait for the disk, so that the file survives a power cut; costs milliseconds per file.

    Raises:
        OSError: the file cannot be written, for example because the disk is full; the old file is unchanged.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A block that writes a file and turns an OSError into a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_file(path: Path, write: Callable[[BinaryIO], object], sync: bool = True) -> None:
    """`write_atomically` with a UserError instead of an OSError."""
    with writing(path):
        write_atomically(path, write, sync)


def read_tensors(path: Path, expected: str) -> Any:
    """Return the content of a `torch.save` or safetensors file on the CPU: only tensors and built-in types.

    Nothing in the file is executed: a pickle that names any other class or function is refused while it is read.

    Raises:
        UserError: the file is missing, truncated, or of another kind than expected, which the message names if it is
            known.
    """
    if path.is_dir():
        kind, way_out = describe_folder(path)
        raise UserError(f"{path}: not a file of tensors but {kind}; {way_out}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected {expected}")
    try:
        if is_safetensors(path):
            return read_safetensors(path)
        check_reader(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle or archive raises many types: struct.error, IndexError, ...
        description = describe_file(path)
        if description:
            raise UserError(f"{path}: not a file of tensors but {description[0]}; {description[1]}") from error
        raise UserError(f"{path}: {describe(error)}; expected {expected}") from error


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors in a safetensors file."""
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: reading it needs safetensors: pip install 'safetensors>=0.4'") from error
    return load_file(path)


def check_reader(path: Path) -> None:
    """Refuse the two kinds of files for which PyTorch before 2.6 executes code even with `weights_only`
    (CVE-2025-32434): TorchScript, and the tar archives of PyTorch's first releases."""
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if zipped:
        # torch.load's reader, because another reader could see another archive in a crafted file.
        if "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
            raise ValueError("it is a TorchScript archive, and was not executed")
    elif tarfile.is_tarfile(path):
        raise ValueError("it is a tar archive, and was not executed")


def describe(error: Exception) -> str:
    """Return the reason of a `torch.load` error, without PyTorch's advice on how to load the unsafe file."""
    text = str(error)
    refused = REFUSED_GLOBAL.search(text)
    if refused:
        reason = f"it holds {refused[1]}, which is neither a tensor nor a built-in type, and was not executed"
    elif isinstance(error, KeyError):
        # For example a text whose letters were read as pickle opcodes; the bare key would not help.
        reason = "its content is of another kind"
    else:
        text = text.rpartition("WeightsUnpickler error:")[2].partition(" In PyTorch 2.6")[0]
        reason = (text.strip() or type(error).__name__).splitlines()[0][:200]
    return f"truncated, or not a file of tensors ({reason})"


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON file's object; None if the file is missing or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
