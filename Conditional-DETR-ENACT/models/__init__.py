"""Conditional DETR with and without ENACT."""

from .conditional_detr import build as build_model

__all__ = ["build_model"]
