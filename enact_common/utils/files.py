"""Files that are written whole or not at all, and files of tensors from anywhere."""

import argparse
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

# The original repositories keep their arguments in one; nothing else beyond tensors and built-in types is let in.
torch.serialization.add_safe_globals([argparse.Namespace])

# How PyTorch's messages name a class or function that it did not let in.
NOT_LET_IN = re.compile(r"GLOBAL ([\w.]+)")


def make_folder(folder: Path, flag: str = "--output_dir") -> None:
    """Create a folder, and those above it, where it is missing.

    Args:
        folder: the folder.
        flag: that named it, for the message.

    Raises:
        UserError: it cannot be created, or nothing can be written in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be created ({error.strerror}); choose another folder") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{flag} {folder}: cannot be written to; choose another folder")


def check_no_folder(path: Path) -> None:
    """Refuse to write a file where there is a folder, before any work is done for it.

    Raises:
        UserError: there is one.
    """
    if path.is_dir():
        raise UserError(f"{path}: cannot be written, there is a folder of this name; choose another place")


def write_atomically(path: Path, write: Callable[[BinaryIO], object], sync: bool = True) -> None:
    """Write beside `path` and rename into place: a file of this name is always complete, the old one or the new.

    Args:
        path: the file to make or replace.
        write: puts the content into an open binary file.
        sync: wait until the disk has it, so that a power cut loses nothing; costs milliseconds a file.

    Raises:
        OSError: the disk is full, say; the old file is still there.
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
    """A block that writes a file, and whose failure the user can mend.

    Raises:
        UserError: the system refuses; the message names the file.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_file(path: Path, write: Callable[[BinaryIO], object], sync: bool = True) -> None:
    """`write_atomically`, whose failure the user can mend.

    Raises:
        UserError: it cannot be written.
    """
    with writing(path):
        write_atomically(path, write, sync)


def read_tensors(path: Path, expected: str) -> Any:
    """What `torch.save` or safetensors put into a file: tensors and built-in types alone, on the CPU.

    Nothing in the file is executed: a pickle that names any other class or function is refused as it is read.

    Args:
        path: the file.
        expected: what it should hold, for the message.

    Raises:
        UserError: it is missing, truncated, or holds something else; the message says what, where that shows.
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
    except Exception as error:  # what a damaged pickle or archive raises has no end: struct.error, IndexError, ...
        found = describe_file(path)
        if found:
            raise UserError(f"{path}: not a file of tensors but {found[0]}; {found[1]}") from error
        raise UserError(f"{path}: {describe(error)}; expected {expected}") from error


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file of safetensors' format.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: reading it needs safetensors: pip install 'safetensors>=0.4'") from error
    return load_file(path)


def check_reader(path: Path) -> None:
    """Refuse the two kinds of files that PyTorch before 2.6 gives to readers which execute code, whatever
    `weights_only` says (CVE-2025-32434): TorchScript, and the tar archives of PyTorch's first releases.

    Raises:
        ValueError: it is of one of these kinds.
        RuntimeError: it begins like a zip archive, but is none.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if zipped:
        # The reader that torch.load asks: another one could be shown another archive.
        if "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
            raise ValueError("it is a TorchScript archive, and was not executed")
    elif tarfile.is_tarfile(path):
        raise ValueError("it is a tar archive, and was not executed")


def describe(error: Exception) -> str:
    """What an error of `torch.load` comes down to. Its own text tells how to load the file all the same."""
    text = str(error)
    found = NOT_LET_IN.search(text)
    if found:
        reason = f"it holds {found[1]}, which is neither a tensor nor a built-in type, and was not executed"
    elif isinstance(error, KeyError):
        # Of a text, say, whose letters are taken for orders of a pickle: the key alone tells nobody anything.
        reason = "its content is of another kind"
    else:
        text = text.rpartition("WeightsUnpickler error:")[2].partition(" In PyTorch 2.6")[0]
        reason = (text.strip() or type(error).__name__).splitlines()[0][:200]
    return f"truncated, or not a file of tensors ({reason})"
