"""``python -m weft``: what runs here (no arguments), ``bench`` and ``demo``."""
