"""Optimizers that the layers need."""

from weft.optim.riemannian_sgd import RiemannianSGD

__all__ = ["RiemannianSGD"]
