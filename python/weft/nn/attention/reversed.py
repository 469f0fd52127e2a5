"""Attention whose queries send along their softmax instead of gathering by it."""

from collections import OrderedDict

from torch import Tensor, nn

from weft.nn.attention.heads import check_heads, check_tokens, merge_heads, split_heads
from weft.nn.attention.token_reorganization import TokenPruning
from weft.nn.checks import check_features
from weft.ops.attention.attention import attention


def reversed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    weight: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    r"""Each child divides its value among its parents: attention with transposed weights.

    .. math::
        \text{out}_j = \sum_i P_{ij} \, w_i v_i, \qquad
        P_{ij} = \mathrm{softmax}_j(\text{scale} \cdot \langle q_i, k_j \rangle)

    with children i and parents j. What is sent is conserved: the sum of all outputs is the sum of
    all :math:`w_i v_i`. No matrix is stored. With :math:`S_{ij}` for the scores,

    .. math::
        P_{ij} = e^{S_{ij} - \ell_i}, \qquad \ell_i = \log \sum_j e^{S_{ij}}, \qquad
        \text{out}_j = e^{m_j} \sum_i \frac{e^{S_{ij} - \ell_i}}{e^{m_j}} \, w_i v_i, \qquad
        m_j = \log \sum_i e^{S_{ij} - \ell_i}

    so :math:`\ell` is the log-sum-exp of one attention, and the fraction is the softmax over the
    children of a second one, with keys and queries exchanged and the bias :math:`-\ell_i`, whose
    own log-sum-exp is m. Both are exact, also for large scores, and differentiable.

    Args:
        query: ``(B, H, Nc, D)``, of the children.
        key: ``(B, H, Np, D)``, of the parents.
        value: ``(B, H, Nc, Dv)``, of the children.
        weight: w, ``(B, 1 or H, Nc)``: how much of its value a child sends; 1 if None.
        scale: of the products; :math:`1 / \sqrt D` if None.

    Returns:
        ``(B, H, Np, Dv)``, in the dtype that :func:`weft.attention` returns.

    Raises:
        ValueError: shapes.
        TypeError: tensors that are not floating-point.

    Source: Ding et al., "Visual Dependency Transformers: Dependency Tree Emerges from Reversed
    Attention", CVPR 2023, section 3.1; the two passes are ours.
    """
    for name, x in {"query": query, "key": key, "value": value}.items():
        check_features(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, got {tuple(x.shape)}")
    B, H, N, _ = query.shape
    if value.shape[:3] != (B, H, N):
        raise ValueError(f"value must be ({B}, {H}, {N}, Dv), got {tuple(value.shape)}")
    if weight is not None:
        check_features("weight", weight)
        if weight.shape not in ((B, 1, N), (B, H, N)):
            raise ValueError(f"weight must be ({B}, 1 or {H}, {N}), got {tuple(weight.shape)}")
        value = (weight[..., None] * value).to(value.dtype)
    _, lse = attention(query, key, key[..., :1], scale=scale, return_lse=True)
    bias = -lse[:, :, None]
    out, received = attention(key, query, value, bias=bias, scale=scale, return_lse=True)
    return (received.exp()[..., None] * out).to(out.dtype)


class ReversedAttention(nn.Module):
    r"""Self-attention in which tokens send to their parents, by a soft choice of heads and gates.

    .. math::
        \text{out} = W_O \big[ (A^R_h) V_h \big]_h, \qquad
        A^R_{hji} = \mathrm{softmax}_j\Big(\frac{\langle q_{hi}, k_{hj} \rangle}{\sqrt D}\Big) \,
            p_{hi} \, m_i, \qquad
        p_{\cdot i} = \mathrm{softmax}_h(W_P x_i / \tau), \qquad
        m_i = m^{\text{before}}_i \, \sigma(\text{MLP}(x_i))

    The head selector p makes a child send by few heads; the message m, a product over the layers,
    is what a token still sends: :math:`\sum_{hj} A^R_{hji} = m_i`, so tokens of little m, leaves of
    the tree, can be pruned (:func:`weft.nn.prune_tokens` with m as the score).

    Args:
        dim: C.
        num_heads: H, a divisor of C.
        temperature: tau > 0 of the head selector.
        qkv_bias: whether query, key and value have a bias.
        device, dtype: of the parameters.

    Shapes: x ``(B, N, C)`` and the message of the layers before ``(B, N)``, or None for ones, give
    the result ``(B, N, C)`` and the message ``(B, N)``.

    Raises:
        ValueError: sizes, a temperature out of range, shapes that do not match.
        TypeError: tensors that are not floating-point.

    Source: Ding et al., "Visual Dependency Transformers: Dependency Tree Emerges from Reversed
    Attention", CVPR 2023, section 3 and figure 2; the temperature: appendix D.1. The hidden width
    of the message controller is C / 2, and neither it nor the head selector has a bias.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 12,
        *,
        temperature: float = 0.1,
        qkv_bias: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        factory = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.temperature = dim, num_heads, float(temperature)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.head_selector = nn.Linear(dim, num_heads, bias=False, **factory)
        hidden = max(dim // 2, 1)
        layers = OrderedDict(
            fc1=nn.Linear(dim, hidden, bias=False, **factory),
            act=nn.GELU(),
            fc2=nn.Linear(hidden, 1, bias=False, **factory),
        )
        self.message_controller = nn.Sequential(layers)
        self.proj = nn.Linear(dim, dim, **factory)

    def forward(self, x: Tensor, message: Tensor | None = None) -> tuple[Tensor, Tensor]:
        query, key, value, heads, message = self._sent(x, message)
        out = reversed_attention(query, key, value, weight=heads * message[:, None])
        return self.proj(merge_heads(out)), message

    def dependency(self, x: Tensor, message: Tensor | None = None) -> Tensor:
        """The soft dependency mask ``(B, N, N)``, the sum of A^R over heads: row j of parent j
        tells from which children i it receives. This one is a matrix, in O(N²) memory."""
        query, key, _, heads, message = self._sent(x, message)
        scores = query @ key.mT * query.shape[-1] ** -0.5
        weights = scores.softmax(-1) * (heads * message[:, None])[..., None]
        return weights.sum(1).mT

    def _sent(self, x: Tensor, message: Tensor | None):
        check_tokens("x", x, self.dim)
        if message is not None:
            check_features("message", message)
            if message.shape != x.shape[:2]:
                raise ValueError(
                    f"message must be {tuple(x.shape[:2])}, got {tuple(message.shape)}"
                )
        query, key, value = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, -1))
        heads = (self.head_selector(x) / self.temperature).softmax(-1).mT
        gate = self.message_controller(x).sigmoid().squeeze(-1)
        return query, key, value, heads, gate if message is None else gate * message

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, temperature={self.temperature}"


class DependencyBlock(nn.Module):
    r"""A pre-norm transformer block of :class:`ReversedAttention` that may prune leaves.

    .. math::
        y, m' = \text{attention}(\text{LN}(x), m), \quad z = \text{top}_k(x + y; m'), \quad
        \text{out} = z + \text{MLP}(\text{LN}(z))

    Args:
        dim: C.
        num_heads: H, a divisor of C.
        keep: rate or number of tokens that stay, those that send most, as in
            :class:`TokenPruning`; 1.0 prunes none.
        mlp_ratio: hidden width of the MLP in units of C.
        **options: of :class:`ReversedAttention`.

    Shapes: x ``(B, N, C)`` and the message ``(B, N)`` or None give tokens ``(B, k, C)``, their
    message ``(B, k)`` and the indices ``(B, k)`` of those that stay, by falling message. After the
    last block the published network multiplies its tokens by the message before they are pooled.

    Raises: as :class:`ReversedAttention`.

    Source: Ding et al., "Visual Dependency Transformers: Dependency Tree Emerges from Reversed
    Attention", CVPR 2023, section 3; pruning: DependencyViT-Lite.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 12,
        keep: float | int = 1.0,
        *,
        mlp_ratio: float = 4.0,
        device=None,
        dtype=None,
        **options,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.attn = ReversedAttention(dim, num_heads, **factory, **options)
        self.pruning = TokenPruning(keep, fuse=False, leading=0)
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6, **factory) for _ in range(2))
        hidden = int(dim * mlp_ratio)
        layers = OrderedDict(
            fc1=nn.Linear(dim, hidden, **factory),
            act=nn.GELU(),
            fc2=nn.Linear(hidden, dim, **factory),
        )
        self.mlp = nn.Sequential(layers)

    def forward(self, x: Tensor, message: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        check_tokens("x", x, self.attn.dim)
        y, message = self.attn(self.norm1(x), message)
        x, kept = self.pruning(x + y, message)
        return x + self.mlp(self.norm2(x)), message.gather(1, kept), kept
