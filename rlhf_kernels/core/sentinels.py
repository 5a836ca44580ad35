"""Labels that are no word of any vocabulary, with which row kernels are told more than one word.

One value and one meaning each; csrc/abi.h and kernels/triton/logprobs.py have the same. As they are
below -1, and a label outside the vocabulary is clamped to -1 or refused before, no label of a
caller is one of them.
"""

# The word lies among other columns than those that the kernel is given (kLabelElsewhere). Only
# with SHARD_IGNORED as ignore_index.
ELSEWHERE = -(2**63)
# The token is skipped; as ignore_index it also says that the columns are a part of the vocabulary,
# or that no token is skipped (kShardIgnored).
SHARD_IGNORED = -(2**63) + 1
# Outside the vocabulary of all shards.
NOWHERE = -2
