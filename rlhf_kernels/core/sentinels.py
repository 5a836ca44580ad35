"""Sentinel labels of the row kernels: skipped tokens, and labels outside this vocabulary shard.

csrc/abi_rows.h defines the same values of the first two. A caller's label never equals a sentinel:
all sentinels are below -1, and a bad label is refused or clamped to -1 first.
"""

# The label is owned by another shard of the vocabulary (kLabelElsewhere). Valid only with
# SHARD_IGNORED as ignore_index.
ELSEWHERE = -(2**63)
# The token is skipped (kShardIgnored). As ignore_index it also means that the columns are one shard
# of the vocabulary, or that no token is skipped.
SHARD_IGNORED = -(2**63) + 1
# The label is outside the whole vocabulary.
NOWHERE = -2
