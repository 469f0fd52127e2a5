"""Drop-in use in transformers and timm; neither is imported before it is asked for."""

from weft.integrations.patching import patch


def register() -> None:
    """Makes ``attn_implementation="weft"`` known to transformers (version 5 or newer).

    Attention functions and masks go through transformers' interfaces: any model that does not
    compute attention by itself runs on :func:`weft.attention`, with causal, sliding-window, packed
    and padding masks as rules that no matrix is made for. ``docs/integrations.md`` lists what was
    compared.

    Raises:
        ImportError: no transformers, or one older than version 5.
    """
    from weft.integrations import transformers

    transformers.register()


__all__ = ["patch", "register"]
