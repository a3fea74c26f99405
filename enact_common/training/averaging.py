"""An exponential moving average of a model's weights (`--ema`): smoother than the last step's, and often better."""

import argparse
import copy

import torch
from torch import nn

from enact_common.utils.acceleration import prepare


class WeightAverage:
    """The weights' average over the steps, the latest counting most.

    The decay begins low and rises, min(decay, (1 + n) / (10 + n)) in step n: otherwise the random weights of the start
    would count for as many steps as the decay remembers (the rule of TensorFlow's ExponentialMovingAverage).
    PyTorch's `AveragedModel` is not used: it waits for the device in every step.

    Args:
        model: a detector that is not compiled yet: the copy must not call the original's compiled parts.
        decay: what remains of the average after a step, in [0, 1).

    Attributes:
        model: with the averaged weights.
        steps: how many the average is of.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model)
        self.decay = decay
        self.steps = 0

    def prepare(self, args: argparse.Namespace, device: torch.device) -> None:
        """Move it to its device; it is not compiled, as it only evaluates."""
        prepare(self.model, argparse.Namespace(**{**vars(args), "compile": False}), device)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in a step's weights. Buffers, such as those of norms, are copied."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.steps > 1 else 0.0
        # All at once: a GPU runs one kernel for many tensors.
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        buffers = list(model.buffers())
        if buffers:
            torch._foreach_copy_(list(self.model.buffers()), buffers)

    def load(self, weights: dict[str, torch.Tensor], steps: int) -> None:
        """Go on with an average of earlier steps."""
        self.model.load_state_dict(weights)
        self.steps = steps
