"""Pseudo-labels of deep imbalanced clustering: P²OT and SP²OT."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.nn.checks import check_features, check_sizes
from weft.ops.pairwise.nearest import nearest
from weft.ops.transport.progressive_partial_transport import progressive_partial_transport

MEMORIES = ("memory_logits", "memory_features")


class ProgressivePseudoLabels(nn.Module):
    r"""Soft labels of a growing part of the samples, the surest first, in clusters of free sizes.

    .. math::
        \rho_t = \rho_0 + (1 - \rho_0)\, e^{-5 (1 - t / T)^2}, \qquad
        \text{labels} = n Q, \qquad Q = \text{the plan of mass } \rho_t

    of ``weft.progressive_partial_transport``: a row sums to the share of that sample that has a
    label, and weighs it in the cross entropy. The problem is that of the last ``memory`` samples,
    of which the batch is the end. With ``graph_strength`` it has the semantic term of SP²OT,
    λ₁ = graph_strength (1 − ρ_t), on :func:`neighbor_graph` of the samples' features.

    Args:
        num_clusters: K.
        total_steps: T, calls in training until all mass is labelled.
        memory: samples of the problem, with the batch; 0 for the batch alone.
        initial_mass: ρ₀ in (0, 1].
        epsilon, strength: ε and γ of the transport problem.
        graph_strength: λ₁ at ρ = 0; 0 for P²OT, 1000 in SP²OT.
        neighbors: of the graph.
        outer_iterations: of SP²OT, at most.

    Attributes:
        step: t ``()`` int64; a call in training adds 1 after it.
        memory_logits, memory_features: what is remembered of the last samples, not saved.

    Shapes: logits ``(n, K)``, features ``(n, D)`` with ``graph_strength`` only; labels ``(n, K)``
    without a gradient.

    Raises:
        ValueError: numbers out of range, shapes, a batch larger than the memory, features that are
            missing or not used.
        TypeError: logits or features that are not floating-point.

    Source: Zhang, Ren and He, "P²OT: Progressive Partial Optimal Transport for Deep Imbalanced
    Clustering", ICLR 2024, sections 4.2 to 4.4 (ρ₀ = 0.1, ε = 0.1, γ = 1, memory 5120); "SP²OT:
    Semantic-Regularized Progressive Partial Optimal Transport for Imbalanced Clustering", 2024
    (λ₁ and its schedule, 20 neighbours).
    """

    def __init__(
        self,
        num_clusters: int,
        total_steps: int,
        *,
        memory: int = 5120,
        initial_mass: float = 0.1,
        epsilon: float = 0.1,
        strength: float = 1.0,
        graph_strength: float = 0.0,
        neighbors: int = 20,
        outer_iterations: int = 100,
    ):
        super().__init__()
        check_sizes(num_clusters=num_clusters, total_steps=total_steps, neighbors=neighbors)
        if not isinstance(memory, int) or memory < 0:
            raise ValueError(f"memory must be an integer >= 0, got {memory!r}")
        if not 0 < initial_mass <= 1:
            raise ValueError(f"initial_mass must be in (0, 1], got {initial_mass}")
        if not 0 <= graph_strength < math.inf:
            raise ValueError(f"graph_strength must be >= 0, got {graph_strength}")
        self.num_clusters, self.total_steps, self.memory = num_clusters, total_steps, memory
        self.initial_mass, self.epsilon, self.strength = initial_mass, epsilon, strength
        self.graph_strength, self.neighbors = float(graph_strength), neighbors
        self.outer_iterations = outer_iterations
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        for name in MEMORIES:
            self.register_buffer(name, None, persistent=False)

    @property
    def mass(self) -> float:
        """ρ_t of the next call."""
        left = 1 - min(int(self.step) / self.total_steps, 1.0)
        return self.initial_mass + (1 - self.initial_mass) * math.exp(-5 * left**2)

    @torch.no_grad()
    def forward(self, logits: Tensor, features: Tensor | None = None) -> Tensor:
        check_features("logits", logits, self.num_clusters)
        if logits.dim() != 2 or not len(logits):
            raise ValueError(f"logits must be (n, {self.num_clusters}), got {tuple(logits.shape)}")
        if self.memory and len(logits) > self.memory:
            raise ValueError(f"a batch of {len(logits)} does not fit a memory of {self.memory}")
        if (features is None) != (self.graph_strength == 0):
            raise ValueError("features must be given if graph_strength > 0, and only then")
        known = self._with_memory("memory_logits", logits)
        mass, graph = self.mass, None
        pull = self.graph_strength * (1 - mass)
        if features is not None:
            check_features("features", features)
            if features.dim() != 2 or len(features) != len(logits):
                raise ValueError(
                    f"features must be ({len(logits)}, D), got {tuple(features.shape)}"
                )
            seen = self._with_memory("memory_features", features)
            graph = neighbor_graph(seen, self.neighbors).to(known.dtype) if pull else None
        plan = progressive_partial_transport(
            known,
            mass,
            epsilon=self.epsilon,
            strength=self.strength,
            graph=graph,
            graph_strength=pull,
            outer_iterations=self.outer_iterations,
        )
        if self.training:
            self.step += 1
        return len(known) * plan[len(known) - len(logits) :]

    def _with_memory(self, name: str, batch: Tensor) -> Tensor:
        """What is remembered, the batch last; in training that is remembered."""
        before = getattr(self, name)
        known = batch.detach()
        if self.memory and before is not None:
            known = torch.cat([before.to(known), known])[-self.memory :]
        if self.memory and self.training:
            setattr(self, name, known)
        return known

    def extra_repr(self) -> str:
        return (
            f"num_clusters={self.num_clusters}, total_steps={self.total_steps}, "
            f"memory={self.memory}, graph_strength={self.graph_strength}"
        )


@torch.no_grad()
def neighbor_graph(features: Tensor, neighbors: int = 20) -> Tensor:
    """S ``(n, n)``, sparse COO: cosines of each sample and its nearest others, where positive.

    SP²OT keeps a sparse graph of nearest neighbours; that its weights are cosines, and that a
    sample is not its own neighbour, is our reading.
    """
    check_features("features", features)
    if features.dim() != 2:
        raise ValueError(f"features must be (n, D), got {tuple(features.shape)}")
    check_sizes(neighbors=neighbors)
    n = len(features)
    unit = F.normalize(features.detach(), dim=1)
    found = nearest(unit, unit, min(neighbors + 1, n), "cosine")
    rows = torch.arange(n, device=unit.device)[:, None].expand_as(found.indices)
    keep = (found.indices != rows) & (found.values > 0)
    # Of equal samples the own index may be missing: then one neighbour too many is left out.
    keep &= keep.cumsum(1) <= neighbors
    entries = torch.stack([rows[keep], found.indices[keep]])
    return torch.sparse_coo_tensor(
        entries, found.values[keep], (n, n), check_invariants=False
    ).coalesce()
