"""Rivals of ENACT: other ways to attend to few keys, written from their papers as layers of the same call signature.

Each file holds one method, and `RIVALS` has a row for it. They are layers, not the systems of those papers: see
docs/method/rivals.md.
"""

from .act import AdaptiveClusteringSelfAttention
from .avgpool import AveragePoolSelfAttention
from .base import RivalSelfAttention
from .kmeans import KMeansSelfAttention
from .linear import LinearSelfAttention
from .pnp import PollPoolSelfAttention
from .tome import TokenMergingSelfAttention
from .topk import TopKSelfAttention

RIVALS: dict[str, type[RivalSelfAttention]] = {
    "avgpool": AveragePoolSelfAttention,
    "tome": TokenMergingSelfAttention,
    "topk": TopKSelfAttention,
    "pnp": PollPoolSelfAttention,
    "kmeans": KMeansSelfAttention,
    "act": AdaptiveClusteringSelfAttention,
    "linear": LinearSelfAttention,
}

__all__ = ["RIVALS", "RivalSelfAttention"]
