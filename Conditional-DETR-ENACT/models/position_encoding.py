"""Conditional DETR's position encodings, which are the shared ones, for feature maps and for reference points."""

from enact_common.models.position_encoding import (
    PositionEmbeddingLearned,
    PositionEmbeddingSine,
    build_position_encoding,
    encode_points,
)

__all__ = ["PositionEmbeddingLearned", "PositionEmbeddingSine", "build_position_encoding", "encode_points"]
