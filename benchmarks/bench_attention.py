"""The attention family: its peers, and its benchmarks under pytest."""

from weft.benchmarks.peers_attention import PEERS as PEERS


def test_attention(measured):
    measured()
