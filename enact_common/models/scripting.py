"""Traced graphs of detectors, valid for other input sizes than the example's.

A trace records a model's operations for one input (see `enact_common.attention.tracing`). While `is_tracing()`, models
use code paths that do not fix numbers of the example in the graph.
"""

import copy
import warnings

import torch
from torch import Tensor, nn

from enact_common.nested_tensor import NestedTensor

# Height and width of the example, pixels. Feature maps have more than one cell per side, since a size of 1 would be
# taken for a constant, and are not square.
EXAMPLE_SIZE = (96, 128)


class TensorDetector(nn.Module):
    """A detector with tensors as inputs and outputs, as graphs need."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return `pred_logits` and `pred_boxes` of the last decoder layer, as the detector does.

        In evaluation mode, a model with a mask head also has `pred_masks`.

        Args:
            images: (batch, 3, H, W), as in `Detector`.
            mask: bool (batch, H, W), True where padded; None for no padding.
        """
        if mask is None:
            mask = torch.zeros_like(images[:, 0], dtype=torch.bool)
        outputs = self.model(NestedTensor(images, mask))
        return {name: outputs[name] for name in ("pred_logits", "pred_boxes", "pred_masks") if name in outputs}


def traced(module: nn.Module, *examples: Tensor) -> torch.jit.ScriptModule:
    """Trace a module into a TorchScript module that takes tensors of any size and shares the parameters.

    Dropout and batch norms keep the mode, training or evaluation, that they have now. The module takes tensors like
    `examples`, and returns tensors or a dict of them.
    """
    with warnings.catch_warnings():
        # Warnings about size checks, which also hold for the graph, and about TorchScript's deprecation.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", FutureWarning)
        return torch.jit.trace(module, examples, strict=False, check_trace=False)


def with_parts(module: nn.Module, **parts: nn.Module) -> nn.Module:
    """Return a shallow copy of a module with some submodules replaced."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = module._modules | parts
    return twin


class ScriptableDetector(nn.Module):
    """A detector for `torch.jit.script`: its traced graph behind the detector's own signature.

    The graph keeps the mode, training or evaluation, that the model has now.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        device = next(model.parameters()).device
        images = torch.zeros(2, 3, *EXAMPLE_SIZE, device=device)
        self.graph = traced(TensorDetector(model), images, torch.zeros_like(images[:, 0], dtype=torch.bool))

    def forward(self, samples: NestedTensor) -> dict[str, Tensor]:
        """Return the predictions of the last decoder layer, as the detector returns them."""
        return self.graph(samples.tensors, samples.mask)


class Scriptable(nn.Module):
    """A detector that `torch.jit.script` accepts, directly or as a submodule.

    TorchScript cannot compile its Python: closures, attention passed as an argument, modules as arguments. So a traced
    graph for floating-point images takes its place.
    """

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by `torch.jit.script`: return the traced graph."""
        return ScriptableDetector(self)
