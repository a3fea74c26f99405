"""ENACT: self-attention over keys and values that are clustered by their learned entropy (arXiv:2409.07541).

This folder imports nothing but PyTorch, so it can be copied into another project.
"""

from .clustering import EntropyClustering
from .layer import EnactSelfAttention
from .map_tokens import MapTokens
from .plug_in import plug_in

__all__ = ["EnactSelfAttention", "EntropyClustering", "MapTokens", "plug_in"]
