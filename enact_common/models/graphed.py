"""Encoders as CUDA graphs: one launch for all kernels of the forward pass, and one for those of the backward pass.

A graph repeats the same kernels on the same addresses. So sizes must not depend on data, and the host must neither read
from the GPU nor copy to it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from enact_common.attention.clustering import EQUAL, EntropyClustering
from enact_common.attention.rivals import RivalSelfAttention
from enact_common.models.transformer import TransformerEncoder


class _Bound(nn.Module):
    """A function of tensors, with the module whose parameters it uses."""

    def __init__(self, module: nn.Module, function: Callable[..., Tensor]):
        super().__init__()
        self.module = module
        self.function = function

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(*tensors)


def capture(module: nn.Module, function: Callable[..., Tensor], *samples: Tensor) -> Callable[..., Tensor]:
    """Capture a function of tensors in CUDA graphs: forward, and backward if gradients are enabled.

    Args:
        module: has the parameters that the function uses.
        function: is called four times with copies of the samples; without host reads, see `reason_against_graphs`.
        samples: tensors of the sizes, layouts, dtypes and `requires_grad` of later calls.

    Returns:
        the function for such tensors. Each call overwrites the result of the one before, and each backward pass its
        gradients: gradients cannot be accumulated over several calls.
    """
    train = torch.is_grad_enabled()
    inputs = tuple(sample.detach().clone().requires_grad_(train and sample.requires_grad) for sample in samples)
    kind = samples[0].device.type
    # The graph casts the weights at each replay: a cast from autocast's cache would stay that of the first step.
    with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
        return torch.cuda.make_graphed_callables(_Bound(module, function), inputs)


def graph_encoder(model: nn.Module) -> None:
    """Make the encoder of a detector, or an encoder, run as CUDA graphs, in place.

    The first training pass and the first inference pass are captured. Later ones of the same batch and map size replay
    the graph, others run as before. Call it after the model is on its GPU; the model can then not be copied or pickled.

    Raises:
        ValueError: `reason_against_graphs` names a reason.
    """
    reason = reason_against_graphs(model)
    if reason:
        raise ValueError(f"the encoder cannot be a CUDA graph: {reason}")
    encoder = encoder_of(model)
    eager = encoder.forward
    graphs: dict[tuple, tuple[tuple, Callable]] = {}

    def forward(src: Tensor, key_padding_mask: Tensor, pos: Tensor, size: tuple[int, int]) -> Tensor:
        tensors = src, key_padding_mask, pos
        mode = encoder.training, torch.is_grad_enabled()
        device = src.device.type
        amp = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        inputs = size, amp, *((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in tensors)
        if mode not in graphs:
            graphs[mode] = inputs, capture(encoder, lambda *parts: eager(*parts, size), *tensors)
        captured, graphed = graphs[mode]
        return graphed(*tensors) if captured == inputs else eager(*tensors, size)

    encoder.forward = forward


def encoder_of(model: nn.Module) -> TransformerEncoder | None:
    """Return a detector's encoder; None for Anchor DETR, which has none that is a module."""
    return next((module for module in model.modules() if isinstance(module, TransformerEncoder)), None)


def reason_against_graphs(model: nn.Module) -> str | None:
    """Return why a detector's encoder cannot be captured in a CUDA graph; None if it can."""
    encoder = encoder_of(model)
    if encoder is None:
        return "only DETR's and Conditional DETR's are captured"
    for module in encoder.modules():
        if isinstance(module, EntropyClustering) and module.clusters != EQUAL:
            return f"the host reads the number of clusters of {module.clusters}; pass --enact_clusters equal"
        if isinstance(module, RivalSelfAttention):
            return f"{type(module).__name__} was not tried"
        if getattr(module, "recompute", False):
            return "its activations are recomputed; leave out --checkpoint_activations"
    return None
