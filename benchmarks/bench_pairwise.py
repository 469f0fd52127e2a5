"""The pairwise family: its peers, and its benchmarks under pytest."""

from weft.benchmarks.providers import Peer

PEERS: list[Peer] = []


def test_pairwise(measured):
    measured()
