"""Anchor DETR with and without ENACT."""

from . import row_column_product
from .anchor_detr import build as build_model

__all__ = ["build_model", "row_column_product"]
