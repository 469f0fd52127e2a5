"""The transport family: its peers, and its benchmarks under pytest."""

from weft.benchmarks.peers_transport import PEERS as PEERS


def test_transport(measured):
    measured()
