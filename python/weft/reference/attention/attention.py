r"""Attention, in tiles of queries so that memory is O(tile · keys).

S  = softcap(scale Q Kᵀ) + bias                         softcap_c(x) = c tanh(x / c), or x
P' = u_j exp(S_ij − lse_i),   lse_i = log Σ_j u_j exp S_ij         over the visible keys
P  = r_i P',                  r_i = exp(lse_i − log(exp lse_i + exp sink_h))
O  = (z ∘ P) V                                          z: dropout, 0 or 1 / (1 − p)
c_j = Σ_i w_i P_ij                                      the key sums

Backward, from the gradients dO, dlse and dc:

dP = z ∘ (dO Vᵀ) + w_i dc_j,     δ_i = Σ_j P_ij dP_ij = ⟨dO_i, O_i⟩ + w_i Σ_j P_ij dc_j
dS = P' ∘ (r (dP − δ) + dlse)

and from dS the gradients of all that S is made of; dV = (z ∘ P)ᵀ dO, dsink_h = − Σ (1 − r_i) δ_i,
du_j = Σ_i exp(S_ij − lse_i) (r_i (dP_ij − δ_i) + dlse_i), dw_i = Σ_j P_ij dc_j.

A query that sees no key has O = 0, lse = −∞ and no gradients.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from weft.reference.attention.dropout import kept
from weft.reference.attention.masks import MaskProgram, allowed_pairs

TILE_SCORES = 1 << 22  # scores of one tile of queries, at most, unless one query has more


@dataclass(frozen=True)
class Inputs:
    """The arguments of the ops but for gradients and results; ``()`` of what is absent is None.

    query (B, Hq, Nq, D); key (B, Hkv, Nk, D); value (B, Hkv, Nk, Dv); bias broadcastable to
    (B, Hq, Nq, Nk) with 4 dimensions; sink (Hq,); key_weight (B, 1 or Hq, Nk); query_weight
    (B, 1 or Hq, Nq); seed () int64.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None = None
    sink: Tensor | None = None
    key_weight: Tensor | None = None
    query_weight: Tensor | None = None
    seed: Tensor | None = None
    mask: MaskProgram = MaskProgram()
    scale: float = 1.0
    softcap: float = 0.0
    dropout_p: float = 0.0

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, Hq, Nq, Nk, and query heads for each key head."""
        B, Hq, Nq, _ = self.query.shape
        return B, Hq, Nq, self.key.shape[2], Hq // max(self.key.shape[1], 1)

    def tiles(self) -> list[slice]:
        B, Hq, Nq, Nk, _ = self.sizes
        step = max(1, TILE_SCORES // max(B * Hq * Nk, 1))
        return [slice(i, min(i + step, Nq)) for i in range(0, Nq, step)] or [slice(0, 0)]

    def allowed(self, rows: slice) -> Tensor | None:
        B, Hq, Nq, Nk, _ = self.sizes
        count = rows.stop - rows.start
        return allowed_pairs(self.mask, B, Hq, Nq, Nk, self.query.device, rows.start, count)

    def rows(self, rows: slice) -> "Inputs":
        """With these queries alone, but for the mask."""
        of_queries = lambda t: t if t is None or t.shape[2] == 1 else t[:, :, rows]  # noqa: E731
        return replace(
            self,
            query=self.query[:, :, rows],
            bias=of_queries(self.bias),
            query_weight=None if self.query_weight is None else self.query_weight[..., rows],
        )


def wide(t: Tensor | None) -> Tensor | None:
    """In the dtype of sums."""
    return t if t is None or t.dtype == torch.float64 else t.float()


def seen_keys(x: Inputs) -> Tensor | None:
    """(B or 1, Hkv or 1, Nk): whether any query of the heads of a key head sees a key."""
    if not x.mask.program:
        return None
    *_, Nk, group = x.sizes
    seen = torch.zeros(1, 1, Nk, dtype=torch.bool, device=x.key.device)
    for rows in x.tiles():
        seen = seen | x.allowed(rows).any(2)
    return seen.unflatten(1, (-1, group)).any(2) if seen.shape[1] > 1 else seen


def prepared(x: Inputs, seen: Tensor | None) -> Inputs:
    """In the dtype of sums, one key and value head for each query head, and 0 in place of the keys
    and values that nobody sees, whatever they hold."""
    *_, group = x.sizes
    key, value = wide(x.key), wide(x.value)
    if seen is not None:
        key, value = (torch.where(seen[..., None], t, 0) for t in (key, value))
    bias = x.bias
    if bias is not None:
        bias = wide(bias).masked_fill(bias <= torch.finfo(bias.dtype).min / 2, -torch.inf)
    return replace(
        x,
        query=wide(x.query),
        key=key.repeat_interleave(group, 1),
        value=value.repeat_interleave(group, 1),
        bias=bias,
        sink=wide(x.sink),
        key_weight=wide(x.key_weight),
        query_weight=wide(x.query_weight),
    )


def scores(x: Inputs, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """S of prepared inputs, −∞ where masked, and the derivative of the softcap."""
    query = x.query
    if allowed is not None:
        query = torch.where(allowed.any(3, keepdim=True), query, 0)
    s = x.scale * (query @ x.key.mT)
    slope = torch.ones((), dtype=s.dtype, device=s.device)
    if x.softcap:
        t = torch.tanh(s / x.softcap)
        s, slope = x.softcap * t, 1 - t * t
    if x.bias is not None:
        s = s + x.bias
    return s if allowed is None else torch.where(allowed, s, -torch.inf), slope


def weights(x: Inputs) -> Tensor | None:
    return None if x.key_weight is None else x.key_weight[:, :, None]


def dropout(x: Inputs, rows: slice) -> Tensor | None:
    """z, (B, Hq, rows, Nk)."""
    if not x.dropout_p:
        return None
    B, Hq, _, Nk, _ = x.sizes
    z = kept(x.seed, B, Hq, rows, Nk, x.dropout_p)
    return wide(z.to(x.query.dtype)) / (1 - x.dropout_p)


def attention(x: Inputs, key_sums: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """O (B, Nq, Hq, Dv) in the dtype of the query; in the dtype of sums lse (B, Hq, Nq), the key
    sums (B, Hq, Nk) or empty, and (B, Hq, 2, Nq): a number m_i near the largest score and
    Σ_j u_j exp(S_ij − m_i), 0 and 0 where there is none. A kernel's backward may divide by that:
    the rounding of lse costs P a digit."""
    full = prepared(x, seen_keys(x))
    parts = [_attention_tile(full.rows(r), x.allowed(r), dropout(x, r)) for r in x.tiles()]
    out, lse, sums, normalizer = zip(*parts, strict=True)
    out = torch.cat([o.transpose(1, 2) for o in out], 1).to(x.query.dtype)
    total = sum(sums[1:], sums[0]) if key_sums else out.new_empty(0, dtype=lse[0].dtype)
    return out, torch.cat(lse, 2), total, torch.cat(normalizer, 3)


def _attention_tile(x: Inputs, allowed: Tensor | None, z: Tensor | None):
    s, _ = scores(x, allowed)
    u = weights(x)
    highest = s.detach().amax(3) if s.shape[3] else s.new_full(s.shape[:3], -torch.inf)
    if x.sink is not None:
        highest = torch.maximum(highest, x.sink.detach()[:, None])
    highest = highest.masked_fill(highest == -torch.inf, 0)
    e = (s - highest[..., None]).exp()
    e = e if u is None else e * u
    own = e.sum(3)
    empty = own == 0
    lse = (own.masked_fill(empty, 1).log() + highest).masked_fill(empty, -torch.inf)
    total = own if x.sink is None else own + (x.sink[:, None] - highest).exp()
    p = e / total.masked_fill(empty, 1)[..., None]
    out = (p if z is None else p * z) @ x.value
    sums = p.sum(2) if x.query_weight is None else (p * x.query_weight[..., None]).sum(2)
    normalizer = torch.stack([highest.masked_fill(empty, 0), own.masked_fill(empty, 0)], 2)
    return out, lse, sums, normalizer.detach()


@dataclass(frozen=True)
class Upstream:
    """Gradients of the three results, and the two that the backward reads again. ``out`` and its
    gradient are (B, Nq, Hq, Dv)."""

    out: Tensor
    lse: Tensor
    grad_out: Tensor | None
    grad_lse: Tensor | None
    grad_sums: Tensor | None

    def rows(self, rows: slice) -> "Upstream":
        cut = lambda t: None if t is None else t[:, rows]  # noqa: E731
        return replace(
            self,
            out=cut(self.out),
            lse=self.lse[:, :, rows],
            grad_out=cut(self.grad_out),
            grad_lse=None if self.grad_lse is None else self.grad_lse[:, :, rows],
        )


def attention_backward(x: Inputs, up: Upstream) -> tuple[Tensor | None, ...]:
    """Gradients of query (B, Nq, Hq, D), key and value (B, Nk, Hkv, ·), bias, sink, key_weight and
    query_weight, each in the dtype of its argument; None of what is absent."""
    total: list = [None] * 7
    rows_of_query, rows_of_weight, rows_of_bias = [], [], []
    seen = seen_keys(x)
    for rows in x.tiles():
        parts = tile_backward(x, up, seen, rows)
        query, key, value, bias, sink, key_weight, query_weight = parts
        rows_of_query.append(query)
        rows_of_weight.append(query_weight)
        if bias is not None and x.bias.shape[2] != 1:
            rows_of_bias.append(bias)
            bias = None
        for n, grad in zip((1, 2, 3, 4, 5), (key, value, bias, sink, key_weight), strict=True):
            if grad is not None:
                total[n] = grad if total[n] is None else total[n] + grad
    total[0] = torch.cat(rows_of_query, 1)
    if rows_of_bias:
        total[3] = torch.cat(rows_of_bias, 2)
    if x.query_weight is not None:
        total[6] = torch.cat(rows_of_weight, 2)
    given = (x.query, x.key, x.value, x.bias, x.sink, x.key_weight, x.query_weight)
    return tuple(None if t is None else g.to(t.dtype) for g, t in zip(total, given, strict=True))


def tile_backward(
    x: Inputs, up: Upstream, seen: Tensor | None, rows: slice
) -> tuple[Tensor | None, ...]:
    """What the queries ``rows`` give to each gradient, in the dtype of sums."""
    group = x.sizes[4]
    allowed, z = x.allowed(rows), dropout(x, rows)
    x, up = prepared(x, seen).rows(rows), up.rows(rows)
    dead = up.lse == -torch.inf
    alive = ~dead[..., None]
    s, slope = scores(x, allowed)
    lse = up.lse.masked_fill(dead, 0)
    e = (s - lse[..., None]).exp().masked_fill(~alive, 0)
    r = None
    if x.sink is not None:
        r = (lse - torch.logaddexp(lse, x.sink[:, None])).exp().masked_fill(dead, 0)
    u = weights(x)
    p_own = e if u is None else e * u
    p = p_own if r is None else p_own * r[..., None]

    delta = torch.zeros_like(up.lse)
    dp = torch.zeros_like(s)
    grad_value = torch.zeros_like(x.value)
    if up.grad_out is not None:
        grad_out = torch.where(alive, wide(up.grad_out).transpose(1, 2), 0)
        delta = delta + (grad_out * wide(up.out).transpose(1, 2)).sum(3)
        of_value = grad_out @ x.value.mT
        dp = dp + (of_value if z is None else z * of_value)
        grad_value = (p if z is None else p * z).mT @ grad_out
    grad_weight = None
    if up.grad_sums is not None:
        own = (p * up.grad_sums[:, :, None]).sum(3)
        if x.query_weight is None:
            delta, dp = delta + own, dp + up.grad_sums[:, :, None]
        else:
            delta = delta + x.query_weight * own
            dp = dp + x.query_weight[..., None] * up.grad_sums[:, :, None]
            grad_weight = _sum_to(own, x.query_weight.shape)
    slack = dp - delta[..., None]
    slack = slack if r is None else r[..., None] * slack
    if up.grad_lse is not None:
        slack = slack + up.grad_lse.masked_fill(dead, 0)[..., None]
    visible = e != 0  # where it is 0, a NaN beside it must not count
    grad_s = torch.where(visible, p_own * slack, 0)

    grad_bias = None if x.bias is None else _sum_to(grad_s, x.bias.shape)
    grad_sink = None
    if x.sink is not None:
        grad_sink = -((1 - r) * delta).masked_fill(dead, 0).sum((0, 2))
    grad_key_weight = None
    if u is not None:
        of_weight = torch.where(visible, e * slack, 0).sum(2)
        grad_key_weight = _sum_to(of_weight, x.key_weight.shape)
    if grad_weight is None and x.query_weight is not None:
        grad_weight = torch.zeros_like(x.query_weight)

    grad_product = x.scale * grad_s * slope
    query = x.query if allowed is None else torch.where(allowed.any(3, keepdim=True), x.query, 0)
    grad_query = (grad_product @ x.key).transpose(1, 2)
    per_head = (grad_product.mT @ query, grad_value)
    grad_key, grad_value = (t.unflatten(1, (-1, group)).sum(2).transpose(1, 2) for t in per_head)
    return grad_query, grad_key, grad_value, grad_bias, grad_sink, grad_key_weight, grad_weight


def _sum_to(t: Tensor, shape: torch.Size) -> Tensor:
    dims = [dim for dim, n in enumerate(shape) if n == 1 and t.shape[dim] != 1]
    return t.sum(dims, keepdim=True) if dims else t


def attention_double_backward(
    x: Inputs, up: Upstream, grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> dict[str, Tensor]:
    """Gradients of what ``attention_backward`` gives, by the chain rule in every tile of queries.

    ``grads`` are those of its seven results, ``wanted`` names fields of both arguments.
    """
    names = [*_FIELDS, *_UPSTREAM]
    tensors = {name: getattr(x if name in _FIELDS else up, name) for name in names}
    asked = [name for name in names if name in wanted and tensors[name] is not None]
    total: dict[str, Tensor] = {}
    seen = seen_keys(x)
    for rows in x.tiles():

        def of_tile(*values, rows=rows):
            new = dict(zip(asked, values, strict=True))
            inputs = replace(x, **{n: t for n, t in new.items() if n in _FIELDS})
            upstream = replace(up, **{n: t for n, t in new.items() if n in _UPSTREAM})
            results = tile_backward(inputs, upstream, seen, rows)
            return tuple(t for t, grad in zip(results, grads, strict=True) if grad is not None)

        results, vjp = torch.func.vjp(of_tile, *(tensors[name] for name in asked))
        given = [(n, grad) for n, grad in enumerate(grads) if grad is not None]
        cotangents = tuple(
            _rows_of_gradient(n, wide(grad), rows, part.shape).to(part.dtype)
            for (n, grad), part in zip(given, results, strict=True)
        )
        for name, grad in zip(asked, vjp(cotangents), strict=True):
            total[name] = grad if name not in total else total[name] + grad
    return total


_FIELDS = ("query", "key", "value", "bias", "sink", "key_weight", "query_weight")
_UPSTREAM = ("out", "lse", "grad_out", "grad_lse", "grad_sums")


def _rows_of_gradient(position: int, grad: Tensor, rows: slice, shape: torch.Size) -> Tensor:
    """Of the gradient of a result, the part that a tile of queries made."""
    dim = {0: 1, 3: 2, 6: 2}.get(position)
    return grad if dim is None or grad.shape == shape else grad.narrow(dim, rows.start, shape[dim])
