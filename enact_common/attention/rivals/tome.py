"""Token merging of keys and values.

The bipartite matching and proportional attention of Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023
(arXiv:2210.09461, section 3), as a layer. Written from the paper.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Reduced, RivalSelfAttention, average_by_index, features_of, spread_evenly, take_tokens


class TokenMergingSelfAttention(RivalSelfAttention):
    """M tokens are destinations; every other token merges into the destination with the most similar key.

    Keys and values are the averages of what has merged, and the log of its size is added to the logits.

    Modifications:
        - only keys and values merge, so the layer keeps all queries and the model all tokens;
        - all other tokens merge in one pass, while a pass of the paper merges at most half of the tokens, the most
          similar ones;
        - destinations are spread evenly over an image's own tokens instead of being every second token.
    """

    title = "token merging"

    def reduce(self, key: Tensor, value: Tensor, present: Tensor, map_size: tuple[int, int] | None) -> Reduced:
        """As in the base class."""
        most = self.budget(key.shape[1])
        index, kept = spread_evenly(present, self.image_budgets(present), most)
        features = F.normalize(features_of(self.W_k, key), dim=-1)
        similarity = features @ take_tokens(features, index).transpose(1, 2)  # (batch, N, M)
        target = similarity.masked_fill(~kept.unsqueeze(1), -torch.inf).argmax(dim=-1)  # (batch, N)
        # A destination stays itself, even if rounding makes another one as similar.
        slots = torch.arange(most, device=key.device).where(kept, target.gather(1, index))
        target = target.scatter(1, index, slots)
        (key, value), sizes = average_by_index((key, value), target, present, most)
        return key, value, sizes.log()
