"""Layers and losses."""

from weft.nn.grassmann import GrassmannClassifier

__all__ = ["GrassmannClassifier"]
