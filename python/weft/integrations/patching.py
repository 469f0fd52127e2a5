"""``weft.patch``: a model's attention modules become subclasses of themselves that run on weft."""

from collections import Counter
from importlib import import_module

from torch import nn

from weft.nn.attention.multihead import MultiheadAttention


def patch(model: nn.Module) -> nn.Module:
    """Makes the attention modules of a model run on :func:`weft.attention`, in place.

    Every module whose class is known (``docs/integrations.md``: ``torch.nn.MultiheadAttention``,
    those of timm's vision transformers and Swin transformers, and those of transformers that
    compute attention past its interface) gets a subclass of that class with another ``forward``.
    Parameters, buffers, hooks and the ``state_dict`` stay as they are; what was replaced is
    printed.

    Args:
        model: a module of any depth, also an attention module itself.

    Returns:
        The same model.

    Raises:
        ValueError: nothing in the model is known.
    """
    known = {nn.MultiheadAttention: MultiheadAttention}
    packages = {type(module).__module__.partition(".")[0] for module in model.modules()}
    for package in {"timm", "transformers"} & packages:
        known |= import_module(f"weft.integrations.{package}_modules").REPLACEMENTS
    counted = Counter()
    for module in model.modules():
        if (replacement := known.get(type(module))) is not None:
            counted[type(module).__name__] += 1
            module.__class__ = replacement
        if isinstance(module, MultiheadAttention):
            module._qkv_same_embed_dim = False  # see its constructor
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # which only the layers that are left out now take
    if not counted:
        raise ValueError(
            f"model must have attention modules that are known, found none in "
            f"{type(model).__name__}; for transformers' own, see weft.integrations.register"
        )
    replaced = ", ".join(f"{count} {name}" for name, count in counted.items())
    print(f"weft.patch: {replaced} of {type(model).__name__}")
    return model
