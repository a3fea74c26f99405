"""Conditional DETR's position encodings: the shared ones, of the feature map and of reference points."""

from enact_common.models.position_encoding import (
    PositionEmbeddingLearned,
    PositionEmbeddingSine,
    build_position_encoding,
    encode_points,
)

__all__ = ["PositionEmbeddingLearned", "PositionEmbeddingSine", "build_position_encoding", "encode_points"]
