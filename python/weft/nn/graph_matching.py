"""Two views of a batch as graphs, matched by their nodes and edges."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.nn.progressive_pseudo_labels import neighbor_graph
from weft.ops.transport.sinkhorn import sinkhorn


def adjacency(x: Tensor, k: int) -> Tensor:
    """``(N, N)`` 0/1, symmetric: whether one is among the k nearest of the other."""
    graph = (neighbor_graph(x, k).to_dense() > 0).to(x.dtype)
    return torch.maximum(graph, graph.mT)


def edge_agreement(x: Tensor, y: Tensor, plan: Tensor, graph_x: Tensor, graph_y: Tensor) -> Tensor:
    r"""What matching node i with node k earns in edges, given the plan:

    .. math::
        G_{ik} = \sum_{jl} A_{ij} B_{kl} P_{jl} \langle x_i - x_j, y_k - y_l \rangle

    by four products of N × N matrices: with :math:`S = X Y^\top`,
    :math:`G = S \circ (A P B^\top) - (S \circ A P) B^\top - A (S \circ P B^\top)
    + A (S \circ P) B^\top`.

    Args:
        x: ``(N, D)``, nodes of one graph; y: ``(M, D)``.
        plan: P, ``(N, M)``.
        graph_x: A, ``(N, N)``; graph_y: B, ``(M, M)``.
    """
    S = x @ y.mT
    of_x, of_y = graph_x @ plan, plan @ graph_y.mT
    both = S * (of_x @ graph_y.mT) + graph_x @ (S * plan) @ graph_y.mT
    return both - (S * of_x) @ graph_y.mT - graph_x @ (S * of_y)


class EntropicGraphMatchingLoss(nn.Module):
    r"""Views of the same images should be matched with each other, by features and by neighbours.

    The matching maximises
    :math:`\langle P, S_v \rangle + \frac{\lambda}{2} \langle P, G(P) \rangle` over plans between
    the two views, S_v the cosines of nodes, G the agreement of edges (:func:`edge_agreement`), plus
    an entropy. Each of ``steps`` linearises the second term at the plan before and solves the
    transport problem. The loss is the share of mass that is not on the right pairs,
    :math:`1 - \sum_i P_{ii}`: the Hamming distance to the true matching, relaxed.

    This is the entropic relaxation of the paper's objective. The paper solves the combinatorial
    problem with a black-box solver and estimates its gradient by perturbation (implicit maximum
    likelihood); here the solution is soft and its gradient is the exact one of the last step's plan
    through the costs, the earlier plans being constants.

    Args:
        k: neighbours of a node in its graph, by cosine where positive; edges go both ways.
        edge_weight: λ ≥ 0, over the number of edges of a node.
        epsilon: of the transport, in units of a cosine.
        steps: linearisations, at least 1.

    Shape: x and y ``(N, D)``, row i of both from the same image; the loss is ().

    Source: Nguyen et al., "LVM-Med: Learning Large-Scale Self-Supervised Vision Models for Medical
    Imaging via Second-order Graph Matching", NeurIPS 2023, sections 3.2 and 3.3, relaxed.
    """

    def __init__(
        self, k: int = 5, *, edge_weight: float = 1.0, epsilon: float = 0.05, steps: int = 3
    ):
        super().__init__()
        if k < 1 or steps < 1:
            raise ValueError(f"k and steps must be at least 1, got {k} and {steps}")
        if not (edge_weight >= 0 and epsilon > 0):
            raise ValueError(
                f"edge_weight must be ≥ 0 and epsilon > 0, got {edge_weight} and {epsilon}"
            )
        self.k, self.edge_weight, self.epsilon, self.steps = k, edge_weight, epsilon, steps

    def matching(self, x: Tensor, y: Tensor) -> Tensor:
        """The plan, ``(N, N)``, with mass 1/N in each row and column."""
        if x.dim() != 2 or x.shape != y.shape:
            raise ValueError(
                f"x and y must be (N, D) each, got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if len(x) <= self.k:
            raise ValueError(f"x must have more than k = {self.k} rows, got {len(x)}")
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        graphs = adjacency(x, self.k), adjacency(y, self.k)
        nodes, N = x @ y.mT, len(x)
        plan = nodes.new_full((N, N), 1 / N**2)
        for _ in range(self.steps):
            edges = edge_agreement(x, y, N * plan.detach(), *graphs)
            similarity = nodes + self.edge_weight / self.k * edges
            plan = sinkhorn(-similarity, epsilon=self.epsilon, tolerance=1e-3).plan
        return plan

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return 1 - self.matching(x, y).trace()
