"""Selection of keys and values by a learned score.

In the spirit of Roh et al., "Sparse DETR: Efficient End-to-End Object Detection with Learnable Sparsity", ICLR 2022
(arXiv:2111.14330), where a scoring network selects the encoder tokens that are updated.
"""

import torch
from torch import Tensor, nn

from ..clustering import weigh_channels
from .base import Reduced, RivalSelfAttention, take_tokens


class TopKSelfAttention(RivalSelfAttention):
    """The M tokens with the highest scores are the keys and values; the score is linear in the key.

    Modifications:
        - the score selects keys instead of queries: every token is updated, and attends to the selected ones;
        - the score learns from the detector's loss by a straight-through bias on the logits, instead of from the
          decoder's attention maps.
    """

    title = "the highest learned scores"
    learns_scores = True

    def __init__(self, embed_dim: int, *args, **kwargs):
        super().__init__(embed_dim, *args, **kwargs)
        # A bias would change all logits alike, so it would get no gradient.
        self.W_score = nn.Linear(embed_dim, 1, bias=False)
        self.start_scores()

    def reduce(self, key: Tensor, value: Tensor, present: Tensor, map_size: tuple[int, int] | None) -> Reduced:
        """As in the base class."""
        most = self.budget(key.shape[1])
        index, score = highest(weigh_channels(key, self.W_score.weight[0]), present, most)
        kept = torch.arange(most, device=key.device) < self.image_budgets(present).unsqueeze(1)  # (batch, M)
        bias = straight_through(score).masked_fill(~kept, -torch.inf)
        return take_tokens(key, index), take_tokens(value, index), bias


def highest(score: Tensor, present: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the tokens with the highest scores, best first, and their scores; both (batch, most).

    Args:
        score: (batch, N).
        present: bool (batch, N), False where padded; padded tokens come last.
        most: at most N.
    """
    index = score.detach().masked_fill(~present, -torch.inf).topk(most, dim=1).indices
    return index, score.gather(1, index)


def straight_through(score: Tensor) -> Tensor:
    """Return zeros whose gradient is the score's, same shape."""
    return score - score.detach()
