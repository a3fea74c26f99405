"""Clustering of keys and values by k-means.

K-means inside attention is in Vyas et al., "Fast Transformers with Clustered Attention", NeurIPS 2020
(arXiv:2007.04825), which clusters queries, and in Marin et al., "Token Pooling in Vision Transformers for Image
Classification", WACV 2023 (arXiv:2110.03860), which clusters tokens between layers. This layer clusters keys.
"""

import torch
from torch import Tensor

from .base import Reduced, RivalSelfAttention, average_by_index, features_of, spread_evenly, take_tokens

# Lloyd's iterations; a last assignment follows.
ITERATIONS = 3


class KMeansSelfAttention(RivalSelfAttention):
    """Keys and values are averages over at most M clusters of the projected keys.

    The log of a cluster's size is added to its logit, as in token merging, so that equal keys in a cluster change
    nothing. Clusters have no gradient, the averages do.

    Modifications of clustered attention: keys are clustered instead of queries, by Lloyd's iterations on the keys
    instead of on their hashes, started from tokens that are spread evenly.
    """

    title = "k-means clusters of keys"

    def reduce(self, key: Tensor, value: Tensor, present: Tensor, map_size: tuple[int, int] | None) -> Reduced:
        """As in the base class."""
        most = self.budget(key.shape[1])
        index, kept = spread_evenly(present, self.image_budgets(present), most)
        features = features_of(self.W_k, key)
        centres = take_tokens(features, index)
        for _ in range(ITERATIONS):
            (means,), sizes = average_by_index((features,), nearest(features, centres, kept), present, most)
            # An empty cluster keeps its centre, so that it can fill again.
            centres = means.where(sizes.unsqueeze(-1) > 0, centres)
        (key, value), sizes = average_by_index((key, value), nearest(features, centres, kept), present, most)
        return key, value, sizes.log()


def nearest(features: Tensor, centres: Tensor, kept: Tensor) -> Tensor:
    """Return the nearest centre of each token, int64 (batch, N).

    Args:
        features: (batch, N, d).
        centres: (batch, M, d).
        kept: bool (batch, M), whether a centre counts.
    """
    # |x - c|^2 without |x|^2, which is the same for all centres.
    norms = centres.square().sum(dim=-1).masked_fill(~kept, torch.inf)  # (batch, M)
    return torch.baddbmm(norms.unsqueeze(1), features, centres.transpose(1, 2), alpha=-2).argmin(dim=-1)
