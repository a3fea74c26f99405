"""An exponential moving average of a model's weights (`--ema`): smoother than the last step's, and often better."""

import argparse

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from enact_common.acceleration import prepare


class WeightAverage:
    """The weights' average over the steps, the latest counting most.

    The decay begins low and rises, min(decay, (1 + n) / (10 + n)) in step n: otherwise the random weights of the start
    would count for as many steps as the decay remembers (the rule of TensorFlow's ExponentialMovingAverage).

    Args:
        model: a detector that is not compiled yet: the copy must not call the original's compiled parts.
        decay: what remains of the average after a step, in [0, 1).

    Attributes:
        steps: how many the average is of.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.steps = 0
        self._averaged = AveragedModel(model, multi_avg_fn=self._average)

    @property
    def model(self) -> nn.Module:
        """The model with the averaged weights."""
        return self._averaged.module

    def prepare(self, args: argparse.Namespace, device: torch.device) -> None:
        """Move it to its device; it is not compiled, as it only evaluates."""
        prepare(self.model, argparse.Namespace(**{**vars(args), "compile": False}), device)

    def update(self, model: nn.Module) -> None:
        """Take in a step's weights. Buffers, such as those of norms, are copied."""
        self.steps += 1
        self._averaged.update_parameters(model)

    def _average(self, averaged: list[torch.Tensor], current: list[torch.Tensor], count) -> None:
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        get_ema_multi_avg_fn(decay)(averaged, current, count)

    def load(self, weights: dict[str, torch.Tensor], steps: int) -> None:
        """Go on with an average of earlier steps."""
        self.model.load_state_dict(weights)
        self.steps = steps
        # The first update would copy the model's weights.
        self._averaged.n_averaged.fill_(steps)
