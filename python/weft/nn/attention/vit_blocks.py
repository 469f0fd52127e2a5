"""The blocks of a pretrained vision transformer, taken apart where prompts meet their tokens."""

from collections.abc import Sequence

from torch import Tensor, nn

from weft.nn.attention.heads import merge_heads, split_heads


def check_blocks(blocks: Sequence[nn.Module], count: int) -> None:
    """``count`` pre-norm blocks with the parts that timm's vision transformers name so."""
    if len(blocks) != count:
        raise ValueError(f"blocks must be {count} blocks, one for each layer, got {len(blocks)}")
    for n, block in enumerate(blocks):
        attn = getattr(block, "attn", None)
        parts = [(block, name) for name in ("norm1", "norm2", "mlp")]
        parts += [(attn, name) for name in ("qkv", "proj", "num_heads")]
        missing = [name for owner, name in parts if not hasattr(owner, name)]
        if missing:
            raise ValueError(
                f"blocks must have norm1, attn (qkv, proj, num_heads), norm2 and mlp as timm's "
                f"vision transformers do; blocks[{n}], a {type(block).__name__}, has no "
                + ", ".join(missing)
            )


def block_heads(block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value ``(B, H, N, D)`` of the block's attention."""
    attn = block.attn
    parts = attn.qkv(block.norm1(tokens)).chunk(3, -1)
    query, key, value = (split_heads(t, attn.num_heads) for t in parts)
    return _part(attn, "q_norm")(query), _part(attn, "k_norm")(key), value


def block_result(block: nn.Module, tokens: Tensor, heads: Tensor) -> Tensor:
    """What the block gives for tokens whose attention gave ``heads``, ``(B, H, N, D)``."""
    attn = block.attn
    y = attn.proj(_part(attn, "norm")(merge_heads(heads)))
    y = _part(block, "ls1")(_part(attn, "proj_drop")(y))
    tokens = tokens + _part(block, "drop_path1")(y)
    y = _part(block, "ls2")(block.mlp(block.norm2(tokens)))
    return tokens + _part(block, "drop_path2")(y)


def _part(owner: nn.Module, name: str):
    """A part that not every vision transformer has."""
    return getattr(owner, name, None) or _same


def _same(x: Tensor) -> Tensor:
    return x
