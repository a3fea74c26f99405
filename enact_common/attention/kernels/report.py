"""Compile the Triton kernels for GPUs, without having one, and print what each needs as a Markdown table.

    python -m enact_common.attention.kernels.report

The kernels are compiled for the arguments of the layers' own launches, which run on tensors without data.
"""

import argparse
import contextlib
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from . import pooling, row_column

# Compute capabilities of A100 and H100.
CAPABILITIES = (80, 90)

WARP = 32  # threads

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: the kernel.
        arguments: all arguments by name, constants included.
    """

    kernel: triton.JITFunction
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.__name__

    def source(self) -> ASTSource:
        """Return what Triton would compile for this launch: it fixes an integer of 1 and notes multiples of 16."""
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            special = isinstance(value, int) and not parameter.do_not_specialize
            if parameter.is_constexpr or (special and value == 1):
                signature[parameter.name] = "constexpr"
                constants[index,] = value
                continue
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = TYPES[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            # PyTorch aligns its memory.
            if isinstance(value, torch.Tensor) or (special and value % 16 == 0):
                attributes[index,] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature=signature, constexprs=constants, attrs=attributes)


@dataclass(frozen=True)
class Needs:
    """The resources that one program of a compiled kernel needs.

    Attributes:
        registers: registers of a thread.
        shared: shared memory, bytes.
        spilled: bytes of a thread's local memory, to which registers are spilled.
    """

    registers: int
    shared: int
    spilled: int


class Recorder:
    """Takes the place of a kernel and records its launches instead of running them."""

    def __init__(self, kernel: triton.JITFunction, launches: list[Launch]):
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid):
        def launch(*arguments, **keywords) -> None:
            # The constants are passed by name.
            by_position = dict(zip(self.kernel.arg_names, arguments, strict=False))
            self.launches.append(Launch(self.kernel, by_position | keywords))

        return launch


@contextlib.contextmanager
def recorded(module: ModuleType) -> Iterator[list[Launch]]:
    """Context in which the launches of a module's kernels are recorded instead of run."""
    launches: list[Launch] = []
    kernels = {name: value for name, value in vars(module).items() if isinstance(value, triton.JITFunction)}
    try:
        for name, kernel in kernels.items():
            # Functions that kernels call are never launched.
            setattr(module, name, Recorder(kernel, launches))
        yield launches
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


class KnownLength:
    """A window length that need not be read back."""

    def __init__(self, number: torch.Tensor):
        pass

    def wait(self) -> int:
        return 6


def pooling_launches(equal: bool, dtype: torch.dtype, of_map: bool = False) -> list[Launch]:
    """Launch the kernels of one layer, forward and backward, for 4 x 4,200 tokens of 256 channels, as in DETR-DC5.

    `of_map`: the tokens are maps of Anchor DETR. Kernels that do not differ are left out.
    """
    scored = torch.empty(4200, 4, 256, device="meta").transpose(0, 1)
    key, value = scored.to(dtype), torch.empty(4, 84, device="meta") if of_map else scored.to(dtype)
    weight, bias = torch.empty(256, device="meta"), torch.empty(1, device="meta")
    padded = torch.empty(4, 4200, dtype=torch.bool, device="meta") if equal else None
    setting = pooling.Setting(equal, 256 * equal, temperature=1.0)
    read_back, pooling.ReadBack = pooling.ReadBack, KnownLength
    try:
        with recorded(pooling) as launches:
            columns = value if of_map else None
            started = pooling.Started(scored, padded, weight, bias, torch.empty(17, device="meta"), setting, columns)
            started.await_length()
            pooled = pooling.pool_clusters(started, key, value)
            pooling.pool_gradients(started, key, value, weight, *pooled)
    finally:
        pooling.ReadBack = read_back
    return [launch for launch in launches if not of_map or "SIDES" in launch.arguments]


def row_column_launches(members_last: bool, dtype: torch.dtype) -> list[Launch]:
    """Launch the kernels of one product at the size of Anchor DETR: a map of 50 x 84, 32 images times heads."""
    members = 840 if members_last else 900
    sizes = row_column.Sizes(32, 50, 84, members, 32, members_last)
    shapes = [(32, side, members) if members_last else (32, members, side) for side in (50, 84)]
    col, row = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    with recorded(row_column) as launches:
        if members_last:
            value = torch.empty(32, members, 32, dtype=dtype, device="meta")
            grad = row_column.sum_members(col, row, value, sizes)
        else:
            value = torch.empty(32, 50, 84, 32, dtype=dtype, device="meta")
            grad = row_column.sum_cells(col, row, value, sizes)
        row_column.gradients(col, row, value, grad, sizes)
    return launches


def all_launches(dtype: torch.dtype) -> dict[str, list[Launch]]:
    """Return the launches by what they compute, for keys, values and weights of a dtype."""
    return {
        "equal clusters": pooling_launches(True, dtype),
        "windows": pooling_launches(False, dtype),
        "equal clusters of maps": pooling_launches(True, dtype, of_map=True),
        "windows of maps": pooling_launches(False, dtype, of_map=True),
        "product over clusters": row_column_launches(True, dtype),
        "product over the map": row_column_launches(False, dtype),
    }


def needs_of(launch: Launch, capability: int) -> Needs:
    """Compile a launch's kernel for a compute capability, and return what it needs."""
    with warnings.catch_warnings():
        # Triton 3.9 announces another default for fused multiplications.
        warnings.simplefilter("ignore")
        compiled = compile(launch.source(), target=GPUTarget("cuda", capability, WARP))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return Needs(usage["REG"], compiled.metadata.shared, usage["STACK"] + usage["LOCAL"])


def table(dtype: torch.dtype) -> str:
    """Return a Markdown table of all kernels: registers, shared memory and spills for each compute capability."""
    names = [
        f"sm_{capability}: {column}" for capability in CAPABILITIES for column in ("registers", "shared", "spilled")
    ]
    lines = ["| for | kernel | " + " | ".join(names) + " |", "|---|---|" + "---:|" * len(names)]
    for purpose, launches in all_launches(dtype).items():
        for launch in launches:
            needs = [needs_of(launch, capability) for capability in CAPABILITIES]
            numbers = [str(number) for need in needs for number in (need.registers, need.shared, need.spilled)]
            lines.append(f"| {purpose} | `{launch.name}` | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(description="Print what each Triton kernel needs on a GPU, as Markdown.").parse_args()
    for dtype in (torch.bfloat16, torch.float32):
        print(f"Triton {triton.__version__}, {str(dtype).removeprefix('torch.')}:\n\n{table(dtype)}\n")
