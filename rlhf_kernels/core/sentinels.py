"""Labels outside every vocabulary, by which row kernels tell shards and skipped tokens apart.

One value and one meaning each; csrc/abi.h and kernels/triton/logprobs.py have the same. As they are
below -1, and a label outside the vocabulary is clamped to -1 or refused before, no label of a
caller is one of them.
"""

# The label is owned by another shard of the vocabulary (kLabelElsewhere). Valid only with
# SHARD_IGNORED as ignore_index.
ELSEWHERE = -(2**63)
# The token is skipped. As ignore_index it also says that the columns are a part of the vocabulary,
# or that no token is skipped (kShardIgnored).
SHARD_IGNORED = -(2**63) + 1
# Outside the vocabulary of all shards.
NOWHERE = -2
