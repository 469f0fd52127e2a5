"""The pairwise family: its peers, and its benchmarks under pytest."""

from weft.benchmarks.peers_pairwise import PEERS as PEERS


def test_pairwise(measured):
    measured()
