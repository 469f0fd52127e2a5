"""Peers of the pairwise family, each with the arguments of our function."""

from collections.abc import Callable

import torch

from weft.benchmarks.providers import Peer

METRICS = {"dot": "METRIC_INNER_PRODUCT", "sqeuclidean": "METRIC_L2", "euclidean": "METRIC_L2"}


def faiss_nearest() -> Callable:
    """faiss.knn, exact search; float32 on the CPU."""
    import faiss

    def nearest(x, y, k=1, metric="sqeuclidean", mask=None, largest=None, **options):
        if metric not in METRICS or mask is not None or largest is not None or options:
            raise NotImplementedError("faiss.knn has no such metric, mask or order")
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise NotImplementedError("faiss.knn takes float32 on the CPU")
        faiss.omp_set_num_threads(torch.get_num_threads())
        kind = getattr(faiss, METRICS[metric])
        values, indices = faiss.knn(x.detach().numpy(), y.detach().numpy(), k, metric=kind)
        values = torch.from_numpy(values)
        return values.sqrt() if metric == "euclidean" else values, torch.from_numpy(indices)

    return nearest


def faiss_hamming_topk() -> Callable:
    """faiss.knn_hamming over packed codes."""
    import faiss

    def hamming_topk(queries, database, k=1):
        if queries.device.type != "cpu":
            raise NotImplementedError("faiss.knn_hamming runs on the CPU")
        faiss.omp_set_num_threads(torch.get_num_threads())
        distances, indices = faiss.knn_hamming(queries.numpy(), database.numpy(), k)
        return torch.from_numpy(distances), torch.from_numpy(indices).long()

    return hamming_topk


def keops_pairwise() -> Callable:
    """Kernel sums as symbolic matrices, compiled for each formula at its first use."""
    from pykeops.torch import LazyTensor

    def pairwise(x, y, *, pair, reduce=None, values=None, gamma=1.0, mask=None, **options):
        if pair != "rbf" or reduce != "sum" or mask is not None or options:
            raise NotImplementedError("of the peers only sums of Gaussians are compared with KeOps")
        if x.dtype not in (torch.float32, torch.float64):
            raise NotImplementedError("KeOps on the CPU takes float32 and float64")
        square = ((LazyTensor(x[:, None]) - LazyTensor(y[None])) ** 2).sum(-1)
        kernel = (-gamma * square).exp()
        return kernel.sum(1).squeeze(-1) if values is None else kernel @ values

    return pairwise


def cut_cross_entropy() -> Callable:
    """Apple's cut-cross-entropy: its Triton kernel on a GPU, its compiled formula on the CPU."""
    from cut_cross_entropy import linear_cross_entropy as peer

    def linear_cross_entropy(
        x,
        weight,
        target,
        bias=None,
        *,
        softcap=None,
        margin=None,
        ignore_index=-100,
        label_smoothing=0.0,
        reduction="mean",
    ):
        if margin is not None or label_smoothing:
            raise NotImplementedError("cut-cross-entropy has no margin and no label smoothing")
        kind = "cce_exact" if x.device.type == "cuda" else "torch_compile"
        return peer(
            x,
            weight,
            target,
            bias=bias,
            softcap=softcap,
            ignore_index=ignore_index,
            reduction=reduction,
            impl=kind,
        )

    return linear_cross_entropy


def liger_linear_cross_entropy() -> Callable:
    """Liger's fused linear cross entropy, a Triton kernel."""
    if not torch.cuda.is_available():
        raise NotImplementedError("Liger's kernels need a GPU")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as peer

    def linear_cross_entropy(
        x,
        weight,
        target,
        bias=None,
        *,
        softcap=None,
        margin=None,
        ignore_index=-100,
        label_smoothing=0.0,
        reduction="mean",
    ):
        if margin is not None:
            raise NotImplementedError("Liger has no margin")
        return peer(
            x,
            weight,
            target,
            bias=bias,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            softcap=softcap,
        )

    return linear_cross_entropy


PEERS = [
    Peer("faiss", "nearest", "faiss", "faiss-cpu", faiss_nearest),
    Peer("faiss", "hamming_topk", "faiss", "faiss-cpu", faiss_hamming_topk),
    Peer("keops", "pairwise", "pykeops", "pykeops", keops_pairwise),
    Peer(
        "cce",
        "linear_cross_entropy",
        "cut_cross_entropy",
        "cut-cross-entropy",
        cut_cross_entropy,
    ),
    Peer(
        "liger",
        "linear_cross_entropy",
        "liger_kernel",
        "liger-kernel",
        liger_linear_cross_entropy,
    ),
]
