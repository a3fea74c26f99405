"""Whether a graph is being traced, and sizes that such a graph may depend on.

`torch.export`, `torch.onnx.export` and `torch.jit.trace` call a model once and record what it does. Reading a number
back to Python, looping over a size or branching on one would fix that number in the graph, so the layers take a form
that does none of that while `is_tracing()`.
"""

import torch
from torch import Tensor


def is_tracing() -> bool:
    """Whether a graph is being recorded: not while `torch.compile` traces, which compiles anew for other inputs."""
    # PyTorch 2.4 cannot say that it is exporting: it has the form for any other call then.
    exporting = getattr(torch.compiler, "is_exporting", None)
    return torch.jit.is_tracing() or (exporting is not None and exporting())


def size_from_data(value: Tensor, most) -> int:
    """A size that tensors' values decide, for use in a graph that is being recorded.

    Args:
        value: int64 (), at least 1.
        most: a size of the graph's; the value does not pass it.
    """
    if torch.jit.is_tracing():
        return value  # recorded as a tensor wherever a size is expected
    size = value.item()
    torch._check(size >= 1)
    torch._check(size <= most)
    return size


def smaller_size(number: int, size):
    """The smaller of a number and a size, which may be a graph's."""
    if isinstance(size, int):
        return min(number, size)
    if torch.jit.is_tracing():
        return size.clamp(max=number)
    # By way of a tensor: what follows from a comparison of sizes would hold for those of the example alone.
    return size_from_data(torch.full((), number).clamp(max=size), size)
