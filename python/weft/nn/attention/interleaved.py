"""Local attention of many tokens interleaved with global attention of few latents."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from weft.masks import Blocks, Mask
from weft.nn.attention.heads import check_heads, merge_heads, split_heads
from weft.nn.checks import check_features, check_sizes
from weft.ops.attention.attention import attention


class FITBlock(nn.Module):
    r"""A stage of FIT: groups of tokens work alone, their latents work together.

    .. math::
        X_t \leftarrow \text{local}(X_t), \quad
        L_t \leftarrow L_t + \text{MHA}(\text{LN}(L_t), \text{LN}(X_t)), \quad
        [L_1, \dots, L_T] \leftarrow \text{global}([L_1, \dots, L_T]), \quad
        X_t \leftarrow X_t + \text{MHA}(\text{LN}(X_t), \text{LN}(L_t))

    Local and global are pre-norm transformer layers. Of T groups of n tokens with m latents, local
    attention has :math:`T n^2` pairs and global attention :math:`(T m)^2`, not :math:`(T n)^2`.

    Args:
        dim: width of tokens.
        latent_dim: width of latents.
        local_layers, global_layers: how many of each, >= 0 and >= 1.
        num_heads, latent_heads: heads of each; reading and writing have the fewer of both, over the
            smaller of both widths.
        mlp_ratio: hidden width of a layer in units of its width.
        causal: latents see those of their own and earlier groups only.
        write: whether latents are written back, which the last stage of a network leaves out.
        device, dtype: of the parameters.

    Shapes: tokens ``(B, T, n, dim)`` and latents ``(B, T, m, latent_dim)`` to the same.

    Raises:
        ValueError: sizes, tokens or latents of another shape.
        TypeError: tokens or latents that are not floating-point.

    Source: Chen and Li, "FIT: Far-reaching Interleaved Transformers", 2023, section 2, as in the
    authors' code.
    """

    def __init__(
        self,
        dim: int,
        latent_dim: int,
        local_layers: int = 1,
        global_layers: int = 1,
        *,
        num_heads: int = 8,
        latent_heads: int = 8,
        mlp_ratio: float = 4.0,
        causal: bool = False,
        write: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        check_heads(latent_dim, latent_heads)
        check_sizes(global_layers=global_layers)
        if not isinstance(local_layers, int) or local_layers < 0:
            raise ValueError(f"local_layers must be an integer >= 0, got {local_layers!r}")
        factory = {"device": device, "dtype": dtype}
        self.dim, self.latent_dim, self.causal = dim, latent_dim, causal
        self.local = nn.ModuleList(
            _Layer(dim, num_heads, mlp_ratio, factory) for _ in range(local_layers)
        )
        self.together = nn.ModuleList(
            _Layer(latent_dim, latent_heads, mlp_ratio, factory) for _ in range(global_layers)
        )
        inner, heads = min(dim, latent_dim), min(num_heads, latent_heads)
        check_heads(inner, heads)
        self.read = _Cross(latent_dim, dim, inner, heads, factory)
        self.write = _Cross(dim, latent_dim, inner, heads, factory) if write else None

    def forward(self, tokens: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        self._check("tokens", tokens, self.dim)
        self._check("latents", latents, self.latent_dim)
        if latents.shape[:2] != tokens.shape[:2]:
            raise ValueError(
                f"latents must have the batch and groups of tokens, {tuple(tokens.shape[:2])}, "
                f"got {tuple(latents.shape[:2])}"
            )
        B, T, m, _ = latents.shape
        x, z = tokens.flatten(0, 1), latents.flatten(0, 1)
        for layer in self.local:
            x = layer(x)
        z = z + self.read(z, x)
        z = z.unflatten(0, (B, T)).flatten(1, 2)
        mask = self._mask(T, m, z.device)
        for layer in self.together:
            z = layer(z, mask)
        z = z.unflatten(1, (T, m))
        if self.write is not None:
            x = x + self.write(x, z.flatten(0, 1))
        return x.unflatten(0, (B, T)), z

    def _mask(self, T: int, m: int, device: torch.device) -> Mask | None:
        if not self.causal:
            return None
        groups = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        return Blocks(groups, m)

    def _check(self, name: str, x: Tensor, dim: int) -> None:
        check_features(name, x, dim)
        if x.dim() != 4:
            raise ValueError(f"{name} must be (B, T, n, {dim}), got {tuple(x.shape)}")

    def extra_repr(self) -> str:
        return f"dim={self.dim}, latent_dim={self.latent_dim}, causal={self.causal}"


class _Layer(nn.Module):
    """A pre-norm transformer layer, its parts named as in timm."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, factory: dict):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6, **factory) for _ in range(2))
        self.qkv, self.proj = (nn.Linear(dim, n * dim, **factory) for n in (3, 1))
        hidden = int(dim * mlp_ratio)
        layers = OrderedDict(
            fc1=nn.Linear(dim, hidden, **factory),
            act=nn.GELU(),
            fc2=nn.Linear(hidden, dim, **factory),
        )
        self.mlp = nn.Sequential(layers)

    def forward(self, x: Tensor, mask: Mask | None = None) -> Tensor:
        heads = (split_heads(t, self.num_heads) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.proj(merge_heads(attention(*heads, mask=mask)))
        return x + self.mlp(self.norm2(x))


class _Cross(nn.Module):
    """What tokens take from others, both normalized."""

    def __init__(self, dim: int, other_dim: int, inner: int, num_heads: int, factory: dict):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim, eps=1e-6, **factory)
        self.norm_other = nn.LayerNorm(other_dim, eps=1e-6, **factory)
        self.q = nn.Linear(dim, inner, **factory)
        self.kv = nn.Linear(other_dim, 2 * inner, **factory)
        self.proj = nn.Linear(inner, dim, **factory)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        parts = (self.q(self.norm(x)), *self.kv(self.norm_other(other)).chunk(2, -1))
        heads = (split_heads(t, self.num_heads) for t in parts)
        return self.proj(merge_heads(attention(*heads)))
