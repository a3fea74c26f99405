"""Whether a graph is being traced, and sizes for use in traced graphs.

`torch.export`, `torch.onnx.export` and `torch.jit.trace` call a model once and record its operations. Reading a number
back to Python, looping over a size or branching on one would fix that number in the graph. While `is_tracing()`, the
layers use code paths that do none of these.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def is_tracing() -> bool:
    """Whether a graph is being traced. False under `torch.compile`, which compiles anew for other inputs."""
    # PyTorch 2.4 has no is_exporting; there the layers use their ordinary path.
    exporting = getattr(torch.compiler, "is_exporting", None)
    return torch.jit.is_tracing() or (exporting is not None and exporting())


def size_from_data(value: Tensor, upper_bound) -> int:
    """Return a size that depends on tensor values, for use in a traced graph.

    Args:
        value: int64 (), at least 1.
        upper_bound: a size of the graph.
    """
    if torch.jit.is_tracing():
        return value  # traced as a tensor, which works as a size
    size = value.item()
    torch._check(size >= 1)
    torch._check(size <= upper_bound)
    return size


def smaller_size(number: int, size):
    """Return the smaller of a number and a size, which may belong to a traced graph."""
    if isinstance(size, int):
        return min(number, size)
    if torch.jit.is_tracing():
        return size.clamp(max=number)
    # Through a tensor: a comparison of sizes would be resolved for the example input and fixed in the graph.
    return size_from_data(torch.full((), number).clamp(max=size), size)


def running_minimum(values: Tensor) -> Tensor:
    """Return the minimum of each row's values up to each place: (batch, N), int64, N at most 2^20."""
    if not is_tracing():
        return values.cummin(dim=1).values
    # ONNX has no cumulative minimum. Each step doubles the stretch that a minimum covers.
    for step in range(20):
        behind = F.pad(values, (2**step, 0), value=2**52)
        values = values.minimum(behind[:, : values.shape[1]])
    return values
