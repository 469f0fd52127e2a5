"""Optimizers that the layers need, and the parameters that need them."""

from weft.optim.manifold import ManifoldParameter
from weft.optim.riemannian_sgd import RiemannianSGD

__all__ = ["ManifoldParameter", "RiemannianSGD"]
