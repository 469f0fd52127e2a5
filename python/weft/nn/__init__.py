"""Layers and losses."""

from weft.nn.grassmann import GrassmannClassifier
from weft.nn.triplet import TripletLoss
from weft.nn.vector_quantizer import VectorQuantizer

__all__ = [
    "GrassmannClassifier",
    "TripletLoss",
    "VectorQuantizer",
]
