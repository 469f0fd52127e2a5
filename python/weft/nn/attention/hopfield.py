"""Modern Hopfield networks: retrieval of stored patterns by iterated attention."""

import math

import torch
from torch import Tensor, nn

from weft.nn.attention.heads import merge_heads, split_heads
from weft.nn.checks import check_features, check_sizes
from weft.ops.attention.attention import attention


def hopfield_retrieve(
    state: Tensor,
    stored: Tensor,
    *,
    beta: float | None = None,
    steps: int | None = 1,
    eps: float = 1e-4,
    mask=None,
) -> Tensor:
    r"""States after updates of a continuous modern Hopfield network.

    .. math::
        \xi^{t+1} = X \, \mathrm{softmax}(\beta X^\top \xi^t)

    with the stored patterns as columns of X. Each update is one attention with the stored patterns
    as keys and as values; the energy (:func:`hopfield_energy`) falls with each.

    Args:
        state: ``(B, H, N, D)``, :math:`\xi^0`; B samples of H heads.
        stored: ``(B, H, M, D)``.
        beta: > 0, the inverse temperature; default :math:`1 / \sqrt D`. Large: one pattern is
            retrieved; small: the mean of all.
        steps: number of updates, >= 0, or None: until every head has converged, at which the host
            waits for the device after each update.
        eps: >= 0. A head whose states of no sample moved by more than this (the norm over N and D)
            in an update has converged and is left as it is; 0 only stops at a fixed point.
        mask: True where a state sees a stored pattern, as in :func:`weft.attention`.

    Returns:
        ``(B, H, N, D)``.

    Raises:
        ValueError: shapes, numbers out of range.
        TypeError: tensors that are not floating-point.

    Source: Ramsauer et al., "Hopfield Networks is All You Need", ICLR 2021, equation 3; its
    convergence: theorems 1 and 2.
    """
    _check_patterns(state, stored, beta)
    _check_steps(steps, eps)
    scale = _default_beta(beta, state.shape[-1])
    active = None
    taken = 0
    while steps is None or taken < steps:
        new = attention(state, stored, stored, mask=mask, scale=scale)
        if active is not None:
            new = torch.where(active, new, state)
        if steps is None or taken + 1 < steps:
            moved = torch.linalg.vector_norm((new - state).detach(), dim=(2, 3), keepdim=True)
            going = (moved > eps).any(0, keepdim=True)
            active = going if active is None else active & going
        state, taken = new, taken + 1
        if steps is None and not active.any():
            break
    return state


def hopfield_energy(state: Tensor, stored: Tensor, *, beta: float | None = None) -> Tensor:
    r"""The energy of states in a continuous modern Hopfield network.

    .. math::
        E = -\frac1\beta \log \sum_{i=1}^{M} e^{\beta \langle x_i, \xi \rangle}
            + \frac12 \lVert \xi \rVert^2 + \frac1\beta \log M + \frac12 \max_i \lVert x_i \rVert^2

    Args:
        state: ``(B, H, N, D)``, :math:`\xi`.
        stored: ``(B, H, M, D)``, x, M >= 1.
        beta: > 0; default :math:`1 / \sqrt D`.

    Returns:
        ``(B, H, N)``, >= 0, in float32 or wider, with gradients of all orders that
        :func:`weft.attention` has.

    Raises:
        ValueError: shapes, a beta out of range.
        TypeError: tensors that are not floating-point.

    Source: Ramsauer et al., "Hopfield Networks is All You Need", ICLR 2021, equation 2.
    """
    _check_patterns(state, stored, beta)
    M = stored.shape[2]
    if not M:
        raise ValueError("stored must have at least one pattern")
    beta = _default_beta(beta, state.shape[-1])
    _, lse = attention(state, stored, stored[..., :1], scale=beta, return_lse=True)
    square = state.to(lse.dtype).square().sum(-1)
    largest = stored.to(lse.dtype).square().sum(-1).amax(2, keepdim=True)
    return (math.log(M) - lse) / beta + 0.5 * (square + largest)


class Hopfield(nn.Module):
    r"""Association of state patterns with stored patterns, after some updates of the states.

    .. math::
        \xi^0 = W_Q \, \text{LN}(r), \quad X = W_K \, \text{LN}(y), \quad
        \xi^{t+1} = X \, \mathrm{softmax}(\beta X^\top \xi^t), \quad
        z = W_O \, [W_V \, \text{LN}(v)] \, \mathrm{softmax}(\beta X^\top \xi^T)

    for each head. T = 0 is the attention of transformers; with T updates the states first move
    towards the stored patterns, or towards their metastable means, before values are read.

    Args:
        state_size: width of state patterns r.
        head_dim: width D of a head's association space; default state_size // num_heads.
        num_heads: H.
        stored_size: width of stored patterns y; default state_size.
        value_size: width of the patterns v that are read; default stored_size.
        output_size: width of the result; default state_size.
        beta: > 0; default :math:`1/\sqrt D`.
        steps: T >= 0, or None: until converged, see :func:`hopfield_retrieve`.
        eps: >= 0, where a head has converged.
        normalize: LayerNorm with learned scale of r, y and v.
        normalize_heads: LayerNorm, without parameters, of each head's states and stored patterns:
            then a state is closest to a stored pattern when it is that pattern.
        project: learned projections. Without, the patterns themselves are associated: then
            num_heads is 1, all sizes are state_size, and nothing but LayerNorms is learned.
        bias: of the projections.
        dropout: of the association that values are read by, in training.
        device, dtype: of the parameters.

    Shapes: state ``(B, N, state_size)``, stored ``(B, M, stored_size)``, value
    ``(B, M, value_size)``, default stored; the result is ``(B, N, output_size)``. ``mask``, True
    where a state sees a pattern: as in :func:`weft.attention`, of ``(B, H, N, M)``.

    A fixed number of steps compiles; ``steps=None`` is a loop that the host decides.

    Raises:
        ValueError: sizes, numbers out of range, shapes that do not match.
        TypeError: tensors that are not floating-point.

    Source: Ramsauer et al., "Hopfield Networks is All You Need", ICLR 2021, section 3 and
    appendix A.6. The authors' code compares softmaxes of two updates, an N x M matrix; here
    states are compared.
    """

    def __init__(
        self,
        state_size: int,
        head_dim: int | None = None,
        num_heads: int = 1,
        *,
        stored_size: int | None = None,
        value_size: int | None = None,
        output_size: int | None = None,
        beta: float | None = None,
        steps: int | None = 0,
        eps: float = 1e-4,
        normalize: bool = True,
        normalize_heads: bool = False,
        project: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(state_size=state_size, num_heads=num_heads)
        stored_size = state_size if stored_size is None else stored_size
        value_size = stored_size if value_size is None else value_size
        output_size = state_size if output_size is None else output_size
        if head_dim is None and state_size % num_heads:
            raise ValueError(
                f"state_size must be a multiple of num_heads = {num_heads}, got {state_size}"
            )
        head_dim = state_size // num_heads if head_dim is None else head_dim
        sizes = {"head_dim": head_dim, "stored_size": stored_size}
        sizes |= {"value_size": value_size, "output_size": output_size}
        check_sizes(**sizes)
        if not project and (num_heads != 1 or set(sizes.values()) != {state_size}):
            raise ValueError(
                f"num_heads must be 1 and all sizes state_size = {state_size} without "
                f"projections, got {num_heads} and {sizes}"
            )
        _check_beta(beta)
        _check_steps(steps, eps)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.state_size, self.stored_size, self.value_size = state_size, stored_size, value_size
        self.num_heads, self.beta = num_heads, _default_beta(beta, head_dim)
        self.steps, self.eps, self.dropout = steps, float(eps), float(dropout)
        self.normalize_heads = normalize_heads
        factory = {"device": device, "dtype": dtype}

        def norm(size: int) -> nn.Module:
            return nn.LayerNorm(size, **factory) if normalize else nn.Identity()

        def linear(inner: int, outer: int) -> nn.Module:
            return nn.Linear(inner, outer, bias=bias, **factory) if project else nn.Identity()

        self.norm_state, self.norm_stored = norm(state_size), norm(stored_size)
        self.norm_value = norm(value_size)
        inner = num_heads * head_dim
        self.q_proj, self.k_proj = linear(state_size, inner), linear(stored_size, inner)
        self.v_proj, self.out_proj = linear(value_size, inner), linear(inner, output_size)

    def forward(self, state: Tensor, stored: Tensor, value: Tensor | None = None, *, mask=None):
        value = stored if value is None else value
        self._check_inputs(state, stored, value)
        query = self._heads(self.q_proj(self.norm_state(state)), self.normalize_heads)
        key = self._heads(self.k_proj(self.norm_stored(stored)), self.normalize_heads)
        value = self._heads(self.v_proj(self.norm_value(value)), False)
        options = {"mask": mask, "beta": self.beta, "steps": self.steps, "eps": self.eps}
        query = hopfield_retrieve(query, key, **options)
        dropout_p = self.dropout if self.training else 0.0
        out = attention(query, key, value, mask=mask, scale=self.beta, dropout_p=dropout_p)
        return self.out_proj(merge_heads(out))

    def _heads(self, x: Tensor, normalize: bool) -> Tensor:
        x = split_heads(x, self.num_heads)
        return nn.functional.layer_norm(x, x.shape[-1:]).to(x.dtype) if normalize else x

    def _check_inputs(self, state: Tensor, stored: Tensor, value: Tensor) -> None:
        check_features("state", state, self.state_size)
        check_features("stored", stored, self.stored_size)
        check_features("value", value, self.value_size)
        for name, x in {"state": state, "stored": stored, "value": value}.items():
            if x.dim() != 3 or x.shape[0] != state.shape[0]:
                raise ValueError(
                    f"{name} must have 3 dimensions and the batch of state, got "
                    f"{tuple(x.shape)} beside {tuple(state.shape)}"
                )
        if value.shape[1] != stored.shape[1]:
            raise ValueError(
                f"value must have the {stored.shape[1]} patterns of stored, got {value.shape[1]}"
            )

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, beta={self.beta:.4g}, steps={self.steps}, "
            f"eps={self.eps}, normalize_heads={self.normalize_heads}, dropout={self.dropout}"
        )


class HopfieldPooling(nn.Module):
    r"""Pooling of a set by learned state patterns: :class:`Hopfield` whose states are parameters.

    Args:
        size: width of the patterns of the set.
        quantity: number of learned states.
        **options: of :class:`Hopfield`, whose state_size and stored_size are ``size``.

    Attributes:
        states: ``(quantity, size)``.
        hopfield: the association.

    Shapes: stored ``(B, M, size)`` and, of the values that are read, ``(B, M, value_size)`` give
    ``(B, quantity * output_size)``; ``mask`` of ``(B, H, quantity, M)``, True where a pattern is
    one of the set, as in :func:`weft.attention`.

    Raises: as :class:`Hopfield`.

    Source: Ramsauer et al., "Hopfield Networks is All You Need", ICLR 2021, section 3.
    """

    def __init__(self, size: int, quantity: int = 1, *, device=None, dtype=None, **options):
        super().__init__()
        check_sizes(size=size, quantity=quantity)
        self.hopfield = Hopfield(size, device=device, dtype=dtype, **options)
        self.states = nn.Parameter(torch.empty(quantity, size, device=device, dtype=dtype))
        nn.init.normal_(self.states, std=0.02)

    def forward(self, stored: Tensor, value: Tensor | None = None, *, mask=None) -> Tensor:
        check_features("stored", stored, self.hopfield.stored_size)
        states = self.states.expand(stored.shape[0], -1, -1)
        return self.hopfield(states, stored, value, mask=mask).flatten(1)


class HopfieldLayer(nn.Module):
    r"""Lookup in learned stored patterns: :class:`Hopfield` whose stored patterns are parameters.

    The stored patterns may be set to training samples or their prototypes; with
    ``separate_values`` what is read (targets, say) is learned apart from what is compared.

    Args:
        size: width of state patterns.
        quantity: number of stored patterns.
        separate_values: whether values have patterns of their own.
        **options: of :class:`Hopfield`, whose state_size is ``size``.

    Attributes:
        stored: ``(quantity, stored_size)``.
        values: ``(quantity, value_size)``, or None.
        hopfield: the association.

    Shapes: state ``(B, N, size)`` gives ``(B, N, output_size)``; ``mask`` of
    ``(B, H, N, quantity)``.

    Raises: as :class:`Hopfield`.

    Source: Ramsauer et al., "Hopfield Networks is All You Need", ICLR 2021, section 3.
    """

    def __init__(
        self,
        size: int,
        quantity: int = 1,
        *,
        separate_values: bool = False,
        device=None,
        dtype=None,
        **options,
    ):
        super().__init__()
        check_sizes(size=size, quantity=quantity)
        factory = {"device": device, "dtype": dtype}
        self.hopfield = Hopfield(size, **factory, **options)
        self.stored = nn.Parameter(torch.empty(quantity, self.hopfield.stored_size, **factory))
        nn.init.normal_(self.stored, std=0.02)
        values = None
        if separate_values:
            values = nn.Parameter(torch.empty(quantity, self.hopfield.value_size, **factory))
            nn.init.normal_(values, std=0.02)
        elif self.hopfield.value_size != self.hopfield.stored_size:
            raise ValueError("value_size must be stored_size where values are not separate")
        self.register_parameter("values", values)

    def forward(self, state: Tensor, *, mask=None) -> Tensor:
        check_features("state", state, self.hopfield.state_size)
        stored, values = (
            None if p is None else p.expand(state.shape[0], -1, -1)
            for p in (self.stored, self.values)
        )
        return self.hopfield(state, stored, values, mask=mask)


def _default_beta(beta: float | None, D: int) -> float:
    return 1 / math.sqrt(D) if beta is None else float(beta)


def _check_beta(beta: float | None) -> None:
    if beta is not None and not 0 < beta < math.inf:
        raise ValueError(f"beta must be > 0 and finite, got {beta}")


def _check_steps(steps: int | None, eps: float) -> None:
    if steps is not None and (not isinstance(steps, int) or steps < 0):
        raise ValueError(f"steps must be an integer >= 0 or None, got {steps!r}")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")


def _check_patterns(state: Tensor, stored: Tensor, beta: float | None) -> None:
    check_features("state", state)
    check_features("stored", stored)
    B, H, _, D = state.shape if state.dim() == 4 else (0, 0, 0, 0)
    if state.dim() != 4 or D < 1:
        raise ValueError(f"state must be (B, H, N, D) with D >= 1, got {tuple(state.shape)}")
    if stored.dim() != 4 or stored.shape[:2] != (B, H) or stored.shape[3] != D:
        raise ValueError(f"stored must be ({B}, {H}, M, {D}), got {tuple(stored.shape)}")
    _check_beta(beta)
