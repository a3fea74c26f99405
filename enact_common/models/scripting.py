"""Graphs that are recorded of a model, for other inputs than the one they are recorded with.

`torch.export`, `torch.onnx.export` and `torch.jit.trace` call a model once and note what it does. What would read a
number back to Python, loop over a size, or choose by one, would fix it in the graph: where `recording` says so, models
take a form that does none of that.
"""

import copy
import warnings

import torch
from torch import Tensor, nn

from enact_common.nested_tensor import NestedTensor

# Height and width, pixels, of what a graph is recorded with: feature maps of more than one cell each way, which would
# pass for constants, and not as high as wide.
EXAMPLE_SIZE = (96, 128)


class TensorDetector(nn.Module):
    """A detector from tensors to tensors, which is what graphs have to do with.

    Args:
        model: a detector.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Detect.

        Args:
            images: (batch, 3, H, W), as a detector takes them.
            mask: bool (batch, H, W), True where padded; None for no padding.

        Returns:
            `pred_logits` and `pred_boxes` of the last decoder layer, and with a mask head in evaluation mode
            `pred_masks`, as the detector says.
        """
        if mask is None:
            mask = torch.zeros_like(images[:, 0], dtype=torch.bool)
        outputs = self.model(NestedTensor(images, mask))
        return {name: outputs[name] for name in ("pred_logits", "pred_boxes", "pred_masks") if name in outputs}


def traced(module: nn.Module, *examples: Tensor) -> torch.jit.ScriptModule:
    """A TorchScript module of a module's graph, for tensors of any size; it shares the parameters.

    Dropout and batch norms stay in the mode, training or evaluation, that they are in now.

    Args:
        module: takes and returns tensors, or returns a dict of them.
        examples: to record it with.
    """
    with warnings.catch_warnings():
        # Of checks of sizes, which hold for the graph as well, and that TorchScript goes out of use.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", FutureWarning)
        return torch.jit.trace(module, examples, strict=False, check_trace=False)


def with_parts(module: nn.Module, **parts: nn.Module) -> nn.Module:
    """A module that is another one but for some of its parts; the other one stays as it is."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = module._modules | parts
    return twin


class ScriptableDetector(nn.Module):
    """What `torch.jit.script` makes of a detector: its graph, behind the detector's own signature.

    Args:
        model: a detector, in the mode, training or evaluation, that the graph shall keep.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        device = next(model.parameters()).device
        images = torch.zeros(2, 3, *EXAMPLE_SIZE, device=device)
        self.graph = traced(TensorDetector(model), images, torch.zeros_like(images[:, 0], dtype=torch.bool))

    def forward(self, samples: NestedTensor) -> dict[str, Tensor]:
        """The predictions of the last decoder layer, as the detector returns them."""
        return self.graph(samples.tensors, samples.mask)


class Scriptable(nn.Module):
    """A detector that `torch.jit.script` can take, by itself or as a part of another module.

    Its Python is not compiled: closures, attention that is handed in and modules as arguments have no counterpart in
    TorchScript. Its graph is recorded, for floating point images, and takes the detector's place there.
    """

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by `torch.jit.script`."""
        return ScriptableDetector(self)
