"""The stats family: its benchmarks under pytest. No other package computes the ops."""

from weft.benchmarks.providers import Peer

PEERS: list[Peer] = []


def test_stats(measured):
    measured()
