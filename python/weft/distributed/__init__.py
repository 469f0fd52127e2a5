"""Losses whose rows or classes are spread over a process group, and what they are made of.

Plain Python over collectives and point-to-point messages: a process group enters no op. Imports
torch alone; the ops with a ``group=`` call it.
"""

from weft.distributed.collectives import copy_to_group, gather, shard_sizes, sum_over_group
from weft.distributed.ring import ring_sums
from weft.distributed.sharded import log_sum_exp_over_group, sharded_cross_entropy

__all__ = [
    "copy_to_group",
    "gather",
    "log_sum_exp_over_group",
    "ring_sums",
    "shard_sizes",
    "sharded_cross_entropy",
    "sum_over_group",
]
