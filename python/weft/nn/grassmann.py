"""The head of the Grassmann class representation."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weft.ops.pairwise.subspace_logits import subspace_logits
from weft.optim.manifold import ManifoldParameter


class GrassmannClassifier(nn.Module):
    r"""Classifies features by the length of their projection onto one subspace per class.

    .. math::
        \text{logit}_c = \gamma \, \lVert S_c^\top x \rVert / \lVert x \rVert

    It takes the place of ``torch.nn.Linear(in_features, num_classes)`` before a cross entropy.
    Train it with :class:`weft.optim.RiemannianSGD`, which keeps the bases orthonormal.

    Args:
        in_features: D.
        num_classes: C.
        dim: dimension k of the subspaces, or one per class (the weight then has the largest, and
            zeros in the rows that are not used).
        gamma: scale of the logits, >= 0.
        device, dtype: of the weight.

    Attributes:
        weight: :class:`weft.ManifoldParameter` of shape ``(C, k, D)``: each ``weight[c]`` has
            orthonormal rows.

    Shapes: features ``(..., D)``, logits ``(..., C)``.

    Raises:
        ValueError: sizes that are not positive, a dimension larger than ``in_features``.

    Source: Wang et al., "Get the Best of Both Worlds: Improving Accuracy and Transferability by
    Grassmann Class Representation", ICCV 2023, equation 4.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        dim: int | Sequence[int],
        *,
        gamma: float = 25.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dims = [dim] * num_classes if isinstance(dim, int) else list(dim)
        if in_features < 1 or num_classes < 1:
            raise ValueError(
                f"in_features and num_classes must be >= 1, got {in_features} and {num_classes}"
            )
        if len(dims) != num_classes:
            raise ValueError(f"dim must be one number or {num_classes} of them, got {len(dims)}")
        if not 1 <= min(dims) <= max(dims) <= in_features:
            raise ValueError(f"dim must be from 1 to in_features = {in_features}, got {dim}")
        if not gamma >= 0:
            raise ValueError(f"gamma must be >= 0, got {gamma}")
        self.in_features, self.out_features = in_features, num_classes
        self.gamma = float(gamma)
        ragged = None if min(dims) == max(dims) else torch.tensor(dims, device=device)
        self.register_buffer("dims", ragged)
        shape = (num_classes, max(dims), in_features)
        empty = torch.empty(shape, device=device, dtype=dtype)
        self.weight = ManifoldParameter(empty, "grassmann", dims=ragged)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """New random subspaces, uniform on the Grassmann manifold."""
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        gaussian = torch.randn(self.weight.shape, device=self.weight.device, dtype=wide)
        rows = torch.linalg.qr(gaussian.mT).Q.mT
        if self.dims is not None:
            unused = torch.arange(rows.shape[1], device=rows.device) >= self.dims[:, None]
            rows = rows.masked_fill(unused[..., None], 0)
        self.weight.copy_(rows)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must be (..., {self.in_features}), got {tuple(x.shape)}")
        rows = x.reshape(x.shape[:-1].numel(), self.in_features)
        bases = self.weight.mT
        logits = subspace_logits(rows, bases, dims=self.dims, gamma=self.gamma, normalize=True)
        return logits.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn, recurse=True):
        """A weight that is replaced on its way to a device (from meta, say) keeps its kind."""
        super()._apply(fn, recurse)
        if not isinstance(self.weight, ManifoldParameter):
            self.weight = ManifoldParameter(self.weight, requires_grad=self.weight.requires_grad)
        self.weight.dims = self.dims
        return self

    def extra_repr(self) -> str:
        k = self.weight.shape[1] if self.dims is None else self.dims.tolist()
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, dim={k}, "
            f"gamma={self.gamma}"
        )
