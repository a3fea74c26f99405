"""An exponential moving average (EMA) of a model's weights (`--ema`), often better than the latest weights."""

import copy

import torch
from torch import nn


class WeightAverage:
    """An exponential moving average of a model's weights over the steps.

    The decay in step n is min(decay, (1 + n) / (10 + n)), TensorFlow's ExponentialMovingAverage rule, so that the
    random initial weights are soon forgotten. PyTorch's `AveragedModel` waits for the device in every step and is not
    used.

    Args:
        model: a detector that is not compiled yet, because a copy would call the original's compiled methods.
        decay: factor of the old average in each step, in [0, 1).

    Attributes:
        model: the model with EMA weights.
        steps: number of steps averaged.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the weights of a step to the average. Buffers, such as batch-norm statistics, are copied."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.steps > 1 else 0.0
        # foreach: a GPU runs one kernel for many tensors.
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        buffers = list(model.buffers())
        if buffers:
            torch._foreach_copy_(list(self.model.buffers()), buffers)

    def load(self, weights: dict[str, torch.Tensor], steps: int) -> None:
        """Restore the average of earlier steps."""
        self.model.load_state_dict(weights)
        self.steps = steps
