"""The benchmarks, installed as ``weft.benchmarks``: one harness for ``pytest benchmarks`` and for
``python -m weft bench``.

They live in the package, and not beside it, because whoever installed a wheel has no checkout, and
"which kernel wins on my machine?" should still be one command. ``bench_<family>.py`` declares the
peers of a family; what is run (inputs, plain PyTorch, FLOPs, bytes) is in
``weft/ops/<family>/cases/<op>.py``.
"""
