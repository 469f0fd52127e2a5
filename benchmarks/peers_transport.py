"""Peers of the transport family, each with the arguments of our function."""

from weft.benchmarks.providers import Peer

PEERS: list[Peer] = []
