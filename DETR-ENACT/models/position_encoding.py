"""DETR's position encodings, which are the shared ones."""

from enact_common.models.position_encoding import (
    PositionEmbeddingLearned,
    PositionEmbeddingSine,
    build_position_encoding,
)

__all__ = ["PositionEmbeddingLearned", "PositionEmbeddingSine", "build_position_encoding"]
