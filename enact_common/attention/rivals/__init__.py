"""Rivals of ENACT: other ways to attend to few keys, written from their papers as layers of the same call signature.

Each file holds one method, and `RIVALS` has a row for it. They are layers, not the systems of those papers: see
docs/method/rivals.md.
"""

from .avgpool import AveragePoolSelfAttention
from .base import RivalSelfAttention

RIVALS: dict[str, type[RivalSelfAttention]] = {
    "avgpool": AveragePoolSelfAttention,
}

__all__ = ["RIVALS", "RivalSelfAttention"]
