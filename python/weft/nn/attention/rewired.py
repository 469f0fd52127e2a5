"""Attention of pretrained generators with some keys, values or weights exchanged."""

from collections.abc import Sequence

import torch
from torch import Tensor

from weft.masks import Dense, Mask, Segments
from weft.nn.checks import check_features, full_precision
from weft.ops.attention.attention import attention


def nested_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    nested_key: Tensor,
    nested_value: Tensor,
    subject: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    r"""Cross-attention to a prompt in which the value of one token depends on the query.

    .. math::
        \text{out}_q = \sum_{s \ne s^*} A_{qs} v_s + A_{q s^*} v^*_q, \qquad
        v^*_q = \mathrm{softmax}(\text{scale} \cdot q K_n^\top) \, V_n

    with A the attention of the prompt. Every place of the image takes from the subject's token
    what the subject's features have for it, in the amount that the prompt gives to that token.
    It is computed as attention plus :math:`A_{qs^*} (v^*_q - v_{s^*})`, where one weight for each
    query follows from the log-sum-exp.

    Args:
        query: ``(B, H, N, D)``, of the image.
        key: ``(B, H, S, D)``, of the prompt.
        value: ``(B, H, S, Dv)``.
        nested_key: ``(B, H, M, D)``, of the subject's features.
        nested_value: ``(B, H, M, Dv)``.
        subject: ``(B,)`` int64, the place of the subject's token in the prompt.
        scale: of both products; :math:`1 / \sqrt D` if None.

    Returns:
        ``(B, H, N, Dv)``.

    Raises:
        ValueError: shapes.
        TypeError: tensors of other kinds.

    Source: Patashnik et al., "Nested Attention: Semantic-aware Attention Values for Concept
    Personalization", SIGGRAPH 2025, section 4.
    """
    _check_heads(query=query, key=key, value=value)
    _check_heads(query=query, nested_key=nested_key, nested_value=nested_value)
    if not isinstance(subject, Tensor) or subject.dtype != torch.int64:
        raise TypeError(
            f"subject must be an int64 tensor, got {getattr(subject, 'dtype', type(subject))}"
        )
    if subject.shape != query.shape[:1]:
        raise ValueError(f"subject must be ({query.shape[0]},), got {tuple(subject.shape)}")
    out, lse = attention(query, key, value, scale=scale, return_lse=True)
    special = attention(query, nested_key, nested_value, scale=scale)
    at = subject[:, None, None, None]
    own_key, own_value = (
        t.gather(2, at.expand(-1, t.shape[1], 1, t.shape[3])) for t in (key, value)
    )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with full_precision(query):
        score = scale * (query.to(lse.dtype) * own_key.to(lse.dtype)).sum(-1)
        share = (score - lse).exp()[..., None]
        return (out + share * (special - own_value)).to(out.dtype)


def shared_subject_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    subject: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    r"""Self-attention of images that also see the subject of all other images of the batch.

    .. math::
        O_i = \mathrm{softmax}\big(\text{scale} \cdot Q_i [K_1, \dots, K_B]^\top
            + \log [M_1, \dots, 1, \dots, M_B]\big) \, [V_1, \dots, V_B]

    with the mask :math:`M_b` of the subject's patches, and ones for an image's own. The mask is
    labels of images or a row of keys: it is never a matrix.

    Args:
        query, key: ``(B, H, N, D)``, of B images; without batch of conditions.
        value: ``(B, H, N, Dv)``.
        subject: ``(B, N)`` bool, True for patches of the subject.
        scale: of the products; :math:`1 / \sqrt D` if None.

    Returns:
        ``(B, H, N, Dv)``.

    Raises:
        ValueError: shapes.
        TypeError: tensors of other kinds.

    Source: Tewel et al., "Training-Free Consistent Text-to-Image Generation", SIGGRAPH 2024,
    equations 1 to 3; random removal of subject patches is a change of ``subject``.
    """
    _check_heads(query=query, key=key, value=value)
    B, _, N, _ = query.shape
    _check_flags("subject", subject, (B, N))
    if key.shape[2] != N:
        raise ValueError(f"key must have {N} patches, as query, got {key.shape[2]}")
    images = torch.arange(B, device=query.device).repeat_interleave(N)
    mask = Segments(images) | Dense(subject.reshape(1, 1, 1, B * N))
    rows = (t.transpose(0, 1).flatten(1, 2)[None] for t in (query, key, value))
    out = attention(*rows, mask=mask, scale=scale)
    return out[0].unflatten(1, (B, N)).transpose(0, 1)


def style_injection_attention(
    content_query: Tensor,
    query: Tensor,
    style_key: Tensor,
    style_value: Tensor,
    *,
    preservation: float = 0.75,
    temperature: float = 1.5,
) -> Tensor:
    r"""Self-attention of a stylized image to keys and values of a style image.

    .. math::
        Q = \gamma \, Q_{\text{content}} + (1 - \gamma) \, Q_{\text{stylized}}, \qquad
        \text{out} = \mathrm{softmax}\big(\tau \, Q K_{\text{style}}^\top / \sqrt D\big) \,
            V_{\text{style}}

    Args:
        content_query: ``(B, H, N, D)``, of the content image at the same step.
        query: ``(B, H, N, D)``, of the stylized image.
        style_key: ``(B, H, M, D)``.
        style_value: ``(B, H, M, Dv)``.
        preservation: gamma, in [0, 1].
        temperature: tau > 0, which sharpens what blending the queries has blurred.

    Returns:
        ``(B, H, N, Dv)``.

    Raises:
        ValueError: shapes, numbers out of range.
        TypeError: tensors that are not floating-point.

    Source: Chung et al., "Style Injection in Diffusion: A Training-free Approach for Adapting
    Large-scale Diffusion Models for Style Transfer", CVPR 2024, equations 4 to 6.
    """
    _check_heads(query=query, style_key=style_key, style_value=style_value)
    if content_query.shape != query.shape:
        raise ValueError(
            f"content_query must be {tuple(query.shape)}, got {tuple(content_query.shape)}"
        )
    if not 0 <= preservation <= 1:
        raise ValueError(f"preservation must be in [0, 1], got {preservation}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    blend = torch.lerp(query, content_query, preservation)
    scale = temperature * query.shape[-1] ** -0.5
    return attention(blend, style_key, style_value, scale=scale)


def sink_tokens(hidden: Tensor, dims: Sequence[int], *, threshold: float = 20.0) -> Tensor:
    r"""Tokens that a language model uses as attention sinks: some dimensions are huge there.

    .. math::
        \max_{d \in \text{dims}} \frac{|x_d|}{\sqrt{\frac1C \sum_c x_c^2 + 10^{-6}}} > \tau

    Args:
        hidden: ``(B, N, C)``, hidden states in front of a layer.
        dims: the dimensions, which belong to the model.
        threshold: tau.

    Returns:
        ``(B, N)`` bool.

    Raises:
        ValueError: shapes, no dimension or one out of range.
        TypeError: a tensor that is not floating-point.

    Source: Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models",
    ICLR 2025, section 3.
    """
    check_features("hidden", hidden)
    if hidden.dim() != 3:
        raise ValueError(f"hidden must be (B, N, C), got {tuple(hidden.shape)}")
    dims = list(dims)
    if not dims or not all(0 <= d < hidden.shape[2] for d in dims):
        raise ValueError(f"dims must be dimensions of {hidden.shape[2]}, got {dims}")
    x = hidden if hidden.dtype == torch.float64 else hidden.float()
    root = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return (x[..., dims].abs() / root).amax(-1) > threshold


def redistributed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    visual: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    keep: float = 0.6,
    portion: float = 0.5,
    least: float = 0.2,
) -> Tensor:
    r"""Attention in which heads that look at the image give it what they spend on sinks.

    With :math:`a_G` for the weights of a group of keys, summed, in one row of one head:

    .. math::
        \tilde P_j = \begin{cases}
            p \, P_j & j \in \text{sinks} \\
            P_j + (1 - p) \, a_{\text{sinks}} P_j / a_{\text{seen}} & j \in \text{seen} \\
            P_j & \text{else} \end{cases}
        \qquad \text{seen} = \text{visual} \setminus \text{sinks}

    where :math:`a_{\text{visual} \cap \text{sinks}} \le \rho \, a_{\text{visual}}` and
    :math:`a_{\text{visual}} \ge s`, and P elsewhere. Groups of a row are only rescaled, so the
    groups are attended to one by one and merged by their log-sum-exp: no matrix, and not more
    products than one attention has.

    Args:
        query: ``(B, H, Nq, D)``.
        key: ``(B, H, Nk, D)``.
        value: ``(B, H, Nk, Dv)``.
        sinks: ``(B, Nk)`` bool, see :func:`weft.nn.sink_tokens`.
        visual: ``(B, Nk)`` bool, tokens of the image.
        mask: as in :func:`weft.attention`, causal as a rule.
        keep: p, in [0, 1], what sinks keep.
        portion: rho.
        least: s.

    Returns:
        ``(B, H, Nq, Dv)``.

    Raises:
        ValueError: shapes, numbers out of range.
        TypeError: tensors of other kinds.

    Source: Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models",
    ICLR 2025, section 5, with the rules and values of the authors' code, which edits the rows of
    queries behind the image.
    """
    _check_heads(query=query, key=key, value=value)
    shape = (key.shape[0], key.shape[2])
    _check_flags("sinks", sinks, shape)
    _check_flags("visual", visual, shape)
    for name, number in {"keep": keep, "portion": portion, "least": least}.items():
        if not 0 <= number <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {number}")
    given = Dense(mask) if isinstance(mask, Tensor) else mask
    groups = (visual & ~sinks, visual & sinks, ~visual & sinks, ~visual & ~sinks)
    outs, weights = [], []
    for group in groups:
        own = Dense(group[:, None, None])
        own = own if given is None else own & given
        out, lse = attention(query, key, value, mask=own, return_lse=True)
        outs.append(out)
        weights.append(lse)
    # a row that sees no key has no weights: its softmax would be NaN
    stacked = torch.stack(weights)
    blind = (stacked == -torch.inf).all(0)
    shares = stacked.masked_fill(blind, 0).softmax(0).masked_fill(blind, 0)
    seen, visual_sinks, other_sinks, _ = shares
    looks = (visual_sinks <= portion * (seen + visual_sinks)) & (seen + visual_sinks >= least)
    looks = looks & (seen > 0)
    spent = torch.where(looks, (1 - keep) * (visual_sinks + other_sinks), 0)
    kept = torch.where(looks, keep, 1.0).to(shares.dtype)
    factors = (seen + spent, kept * visual_sinks, kept * other_sinks, shares[3])
    total = sum(f[..., None] * out for f, out in zip(factors, outs, strict=True))
    return total.to(outs[0].dtype)


def _check_heads(**tensors: Tensor) -> None:
    """Query, keys and values, by their names."""
    for name, x in tensors.items():
        check_features(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, got {tuple(x.shape)}")
    (_, query), (key_name, key), (value_name, value) = tensors.items()
    if key.shape[:2] != query.shape[:2] or key.shape[3] != query.shape[3]:
        raise ValueError(
            f"{key_name} must have the batch, heads and width of query, {tuple(query.shape)}, "
            f"got {tuple(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"{value_name} must have the tokens of {key_name}, {tuple(key.shape[:3])}, "
            f"got {tuple(value.shape)}"
        )


def _check_flags(name: str, flags: Tensor, shape: tuple[int, int]) -> None:
    if not isinstance(flags, Tensor) or flags.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {getattr(flags, 'dtype', type(flags))}")
    if tuple(flags.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(flags.shape)}")
