"""DETR with and without ENACT."""

from .detr import build as build_model

__all__ = ["build_model"]
