"""Budgets for the machine code of csrc/cuda's main kernels, which cuda_sass checks.

The limits apply to the fast path of aligned, full tiles; the padding of tiles is counted for the
largest vocabulary in use. A limit is tightened when its kernel improves. It is widened for
exactness alone, by what that costs, with the reason beside it.
"""

from dataclasses import dataclass

# The vocabulary of Qwen's models.
VOCABULARY = 151_936


@dataclass(frozen=True)
class Limit:
    """Maximum instructions per unit, registers, waits for loads, and loads and stores of less than
    16 bytes; minimum KiB of loads in flight on a multiprocessor."""

    instructions: float
    registers: int
    in_flight: int
    waits: int
    narrow_loads: int
    narrow_stores: int


@dataclass(frozen=True)
class Budget:
    """A kernel, its fast path and its limits. A thread works on `units` units; the fast path
    executes at least holds[pattern] operations of each pattern. A tile has `columns` of a row; 0
    means that tiles have no padding. With `loop` the path is an iteration of a loop."""

    name: str
    file: str
    kernel: str
    unit: str
    units: int
    columns: int
    holds: dict[str, int]
    # Bytes per unit read from and written to memory; 0 where caches have them.
    traffic: int
    sm_90: Limit
    sm_100: Limit
    threads: int = 256
    loop: bool = False

    def limits(self, arch: int) -> Limit:
        """The limits for sm_90 or sm_100."""
        return {90: self.sm_90, 100: self.sm_100}[arch]

    @property
    def waste(self) -> float:
        """Columns of all tiles of a row, padding included, divided by the columns of the row."""
        if self.columns == 0:
            return 1.0
        return -(-VOCABULARY // self.columns) * self.columns / VOCABULARY


def _row(slots: int, exponentials: int, stores: int = 0) -> dict[str, int]:
    """The operations on a path through a tile of logits."""
    stored = {r"STG": stores} if stores else {}
    made = {r"MUFU\.EX2": exponentials} if exponentials else {}
    return {r"LDG\.E\.128": slots} | made | stored


def _tokens(
    loads: int, stores: int, more: dict[str, int], *, step: int | None = 1024
) -> dict[str, int]:
    """The operations on a path through a thread's tokens.

    `step`: between the two four bytes of its mask, by which a load of the mask is known from others
    of four bytes, such as of offsets; None without a mask.
    """
    found = {r"LDG\.E\.128": loads, r"STG\.E\.128": stores}
    if step is not None:
        found |= {r"LDG\.E ": 2, rf"LDG\.E R\d+, desc\S*\[R\d+\.64\+{step:#x}\]": 1}
    return found | more


_LOGPROBS, _KL, _ROWS = "logprobs.cu", "kl.cu", "policy_rows.cu"
_MANY, _SUPPORT, _GENERAL = "logprobs_many.cu", "support.cu", "kl_general.cu"
_MISMATCH, _GENERAL_GAE = "mismatch.cu", "advantages_general.cu"
_WHITEN, _GROUPS = "advantages_whiten.cu", "advantages_groups.cu"

# fmt: off
BUDGETS = (
    Budget("token_logprobs, bf16", _LOGPROBS,
           "partial_kernel<BF16, false, false, false>", "logit", 64, 2048, _row(8, 64), 2,
           Limit(7.1, 60, 128, 2, 1, 0), Limit(7.1, 62, 128, 2, 1, 0)),
    Budget("token_logprobs + entropy, bf16", _LOGPROBS,
           "partial_kernel<BF16, false, true, false>", "logit", 64, 2048, _row(8, 64), 2,
           Limit(8.9, 63, 128, 2, 1, 0), Limit(8.9, 62, 128, 2, 1, 0)),
    # Rows that are not aligned are read by two loads for every 16 bytes.
    Budget("token_logprobs, odd vocabulary, bf16", _LOGPROBS,
           "partial_kernel<BF16, false, false, false>", "logit", 64, 2048,
           _row(8, 64) | {"LDG": 17}, 2,
           Limit(7.9, 60, 160, 2, 9, 0), Limit(7.8, 62, 192, 2, 9, 0)),
    Budget("token_logprobs + entropy, odd vocabulary, bf16", _LOGPROBS,
           "partial_kernel<BF16, false, true, false>", "logit", 64, 2048,
           _row(8, 64) | {"LDG": 17}, 2,
           Limit(9.9, 63, 128, 2, 9, 0), Limit(9.9, 62, 128, 2, 9, 0)),
    Budget("token_logprobs + entropy, fp32", _LOGPROBS,
           "partial_kernel<F32, false, true, false>", "logit", 32, 1024, _row(8, 32), 4,
           Limit(10.9, 60, 128, 2, 1, 0), Limit(10.4, 62, 128, 2, 1, 0)),
    Budget("token_logprobs, softcap, bf16", _LOGPROBS,
           "partial_kernel<BF16, true, false, false>", "logit", 64, 2048,
           _row(8, 128) | {r"MUFU\.RCP": 64}, 2,
           Limit(19.5, 80, 96, 2, 1, 0), Limit(17.4, 80, 96, 2, 1, 0)),
    Budget("token_logprobs + entropy, softcap, bf16", _LOGPROBS,
           "partial_kernel<BF16, true, true, false>", "logit", 64, 2048,
           _row(8, 128) | {r"MUFU\.RCP": 64}, 2,
           Limit(20.7, 80, 96, 2, 1, 0), Limit(18.6, 80, 96, 2, 1, 0)),
    Budget("token_logprobs backward, bf16", _LOGPROBS,
           "backward_kernel<BF16, BF16, false, false, false>", "logit", 32, 1024, _row(4, 32, 4), 4,
           Limit(9.0, 40, 96, 3, 1, 0), Limit(8.8, 40, 96, 3, 1, 0)),
    Budget("token_logprobs + entropy backward, bf16", _LOGPROBS,
           "backward_kernel<BF16, BF16, false, true, false>", "logit", 32, 1024, _row(4, 32, 4), 4,
           Limit(10.7, 40, 96, 3, 1, 0), Limit(10.6, 40, 96, 3, 1, 0)),
    Budget("token_logprobs backward, bf16 of fp32", _LOGPROBS,
           "backward_kernel<F32, BF16, false, false, false>", "logit", 16, 512, _row(4, 16, 2), 6,
           Limit(11.2, 40, 96, 3, 1, 0), Limit(10.9, 40, 96, 3, 1, 0)),
    Budget("token_logprobs + entropy backward, bf16 of fp32", _LOGPROBS,
           "backward_kernel<F32, BF16, false, true, false>", "logit", 16, 512, _row(4, 16, 2), 6,
           Limit(13.5, 40, 96, 3, 1, 0), Limit(13.2, 40, 96, 3, 1, 0)),
    # Tiles of a gradient start where 16 bytes do: rows of an odd vocabulary take the paths above,
    # but for a row's first and last tile. An iteration there has one slot, which is whole or, at
    # the row's ends, goes column by column. The same holds for kl_divergence.
    Budget("token_logprobs backward, odd vocabulary, ends of rows, bf16", _LOGPROBS,
           "backward_kernel<BF16, BF16, false, false, false>", "logit", 8, 0, _row(1, 8, 1), 4,
           Limit(9.5, 40, 24, 1, 0, 0), Limit(8.5, 40, 24, 1, 0, 0), loop=True),
    Budget("token_logprobs + entropy backward, odd vocabulary, ends of rows, bf16", _LOGPROBS,
           "backward_kernel<BF16, BF16, false, true, false>", "logit", 8, 0, _row(1, 8, 1), 4,
           Limit(11.3, 40, 24, 1, 0, 0), Limit(10.3, 40, 24, 1, 0, 0), loop=True),
    Budget("token_logprobs backward, odd vocabulary, columns at ends, bf16", _LOGPROBS,
           "backward_kernel<BF16, BF16, false, false, false>", "logit", 8, 0,
           {r"LDG\.E\.U16": 8, r"MUFU\.EX2": 8, r"STG\.E\.U16": 8}, 4,
           Limit(19.2, 40, 21, 2, 8, 8), Limit(18.5, 40, 15, 2, 8, 8), loop=True),
    # Traded, against the rule above: with 62 to 65 instructions these had 80 KiB in flight (fp32 on
    # sm_90: 20), 48 registers and 3 waits. The compiler now loads a slot or two ahead of their
    # arithmetic, not all. Whether the fewer bytes cost more than the instructions save, no GPU has
    # shown.
    Budget("token_logprobs backward, softcap, bf16", _LOGPROBS,
           "backward_kernel<BF16, BF16, true, false, false>", "logit", 32, 1024, _row(4, 32, 4), 4,
           Limit(27.5, 80, 36, 4, 1, 0), Limit(25.8, 80, 36, 4, 1, 0)),
    Budget("token_logprobs + entropy backward, softcap, bf16", _LOGPROBS,
           "backward_kernel<BF16, BF16, true, true, false>", "logit", 32, 1024, _row(4, 32, 4), 4,
           Limit(28.0, 80, 24, 5, 1, 0), Limit(26.9, 80, 36, 4, 1, 0)),
    Budget("token_logprobs backward, softcap, bf16 of fp32", _LOGPROBS,
           "backward_kernel<F32, BF16, true, false, false>", "logit", 16, 512, _row(4, 16, 2), 6,
           Limit(29.1, 64, 64, 3, 1, 0), Limit(27.9, 64, 64, 3, 1, 0)),
    Budget("token_logprobs + entropy backward, softcap, bf16 of fp32", _LOGPROBS,
           "backward_kernel<F32, BF16, true, true, false>", "logit", 16, 512, _row(4, 16, 2), 6,
           Limit(30.0, 64, 64, 3, 1, 0), Limit(28.9, 64, 64, 3, 1, 0)),
    Budget("kl_divergence, bf16", _KL, "partial_kernel<BF16>", "pair", 32, 1024, _row(8, 64), 4,
           Limit(17.7, 63, 128, 1, 0, 0), Limit(17.8, 64, 128, 1, 0, 0)),
    Budget("kl_divergence, odd vocabulary, bf16", _KL, "partial_kernel<BF16>", "pair", 32, 1024,
           _row(8, 64) | {"LDG": 16}, 4,
           Limit(19.7, 63, 80, 2, 8, 0), Limit(18.8, 64, 224, 1, 4, 0)),
    Budget("kl_divergence backward, reverse, bf16", _KL, "backward_kernel<BF16, BF16, true>",
           "pair", 32, 1024, _row(8, 32, 4), 6,
           Limit(16.2, 64, 128, 2, 0, 0), Limit(15.5, 64, 128, 2, 0, 0)),
    Budget("kl_divergence backward, forward, bf16", _KL, "backward_kernel<BF16, BF16, false>",
           "pair", 32, 1024, _row(8, 64, 4), 6,
           Limit(15.1, 64, 96, 3, 0, 0), Limit(14.4, 64, 96, 3, 0, 0)),
    Budget("kl_divergence backward, reverse, bf16 of fp32", _KL,
           "backward_kernel<F32, BF16, true>", "pair", 16, 512, _row(8, 16, 2), 10,
           Limit(18.9, 56, 128, 2, 0, 0), Limit(18.1, 56, 128, 2, 0, 0)),
    Budget("kl_divergence backward, forward, bf16 of fp32", _KL,
           "backward_kernel<F32, BF16, false>", "pair", 16, 512, _row(8, 32, 2), 10,
           Limit(17.0, 48, 160, 2, 0, 0), Limit(16.1, 48, 160, 2, 0, 0)),
    # With options: the policy's entropy, caps and temperatures of each model, a mixture of both. A
    # mixture takes an exponential and a logarithm a pair whose small terms are exact.
    Budget("kl_divergence + entropy, bf16", _GENERAL, "partial_kernel<BF16>", "pair", 32, 1024,
           _row(8, 64), 4,
           Limit(23.1, 78, 96, 1, 0, 0), Limit(22.8, 128, 64, 1, 0, 0)),
    Budget("kl_divergence + entropy, two softcaps, bf16", _GENERAL, "partial_kernel<BF16>", "pair",
           32, 1024, _row(8, 0) | {r"MUFU\.RCP": 64}, 4,
           Limit(49.5, 78, 96, 1, 0, 0), Limit(49.2, 128, 64, 1, 0, 0)),
    Budget("kl_divergence, mixture, bf16", _GENERAL, "mixture_kernel<BF16>", "pair", 16, 512,
           _row(4, 32), 4,
           Limit(73.5, 76, 63, 1, 1, 0), Limit(65.2, 112, 42, 1, 1, 0)),
    Budget("kl_divergence with options backward, reverse, bf16", _GENERAL,
           "backward_kernel<BF16, BF16, 0>", "pair", 32, 1024, _row(8, 32, 4), 6,
           Limit(28.0, 56, 128, 2, 0, 0), Limit(20.5, 128, 64, 2, 0, 0)),
    Budget("kl_divergence with options backward, forward, bf16", _GENERAL,
           "backward_kernel<BF16, BF16, 1>", "pair", 32, 1024, _row(8, 64, 4), 6,
           Limit(36.6, 55, 128, 2, 0, 0), Limit(27.5, 80, 96, 2, 0, 0)),
    Budget("kl_divergence backward, mixture, bf16", _GENERAL, "backward_kernel<BF16, BF16, 2>",
           "pair", 32, 1024, _row(8, 32, 4), 6,
           Limit(83.1, 56, 128, 2, 1, 0), Limit(71.2, 110, 64, 2, 1, 0)),
    Budget("kl_divergence backward, mixture, bf16 of fp32", _GENERAL,
           "backward_kernel<F32, BF16, 2>", "pair", 16, 512, _row(8, 16, 2), 10,
           Limit(86.2, 59, 128, 2, 1, 0), Limit(73.3, 77, 96, 2, 1, 0)),
    # A thread has four tokens of evenly spaced tensors; the estimator k3, whose scale F2I makes.
    Budget("kl_penalty, k3, fp32", _KL, "penalty_kernel<false, true, true>", "token", 4, 0,
           {r"LDG\.E ": 8, r"STG\.E ": 4, r"F2I\.TRUNC": 4}, 12,
           Limit(46.5, 32, 64, 1, 8, 4), Limit(43.0, 32, 64, 1, 8, 4)),
    Budget("kl_penalty backward, k3, fp32", _KL, "penalty_kernel<true, true, true>", "token", 4, 0,
           {r"LDG\.E ": 12, r"STG\.E ": 4, r"F2I\.TRUNC": 4}, 16,
           Limit(49.8, 28, 96, 1, 12, 4), Limit(49.8, 30, 96, 1, 12, 4)),
    Budget("gae with mask, fp32", "advantages.cu", "scan_kernel<16>", "token", 8, 0,
           _tokens(4, 4, {"DFMA": 24, "F2F": 48, "SHFL": 24}, step=4), 17,
           Limit(72.7, 64, 64, 2, 2, 0), Limit(72.2, 64, 64, 2, 2, 0), threads=512),
    # A tile of the walk along a sequence, one rate for all its steps, every step composed with the
    # one behind it; the path may take steps as masked, which saves it a few instructions.
    # offsets_kernel, a warp that looks at cu_seqlens, has no budget.
    Budget("gae of rates with mask, fp32", _GENERAL_GAE, "general_kernel<false>", "token", 8, 0,
           _tokens(4, 4, {"DFMA": 44, "SHFL": 54}, step=4), 17,
           Limit(124.9, 102, 32, 2, 2, 0), Limit(142.7, 120, 32, 2, 2, 0), threads=512, loop=True),
    Budget("gae of rates with mask, lambda of the returns, fp32", _GENERAL_GAE,
           "general_kernel<true>", "token", 8, 0,
           _tokens(4, 4, {"DFMA": 88, "SHFL": 90}, step=4), 17,
           Limit(171.8, 124, 32, 2, 2, 0), Limit(206.0, 124, 32, 2, 2, 0), threads=512, loop=True),
    # Evenly spaced tokens, one load each.
    Budget("whiten with mask, moments of tiles, fp32", _WHITEN, "moments_kernel<F32, true>",
           "token", 8, 0,
           {r"LDG\.E ": 8, r"LDG\.E\.U8": 8}, 5,
           Limit(40.7, 46, 50, 1, 16, 0), Limit(41.9, 40, 60, 1, 16, 0)),
    Budget("whiten with mask, result, fp32", _WHITEN, "apply_kernel<F32, true>", "token", 8, 0,
           {r"LDG\.E ": 8, r"LDG\.E\.U8": 8, "STG": 8}, 9,
           Limit(20.9, 38, 60, 2, 19, 8), Limit(21.9, 38, 60, 2, 19, 8)),
    # An iteration of its first loop; one block for all tiles.
    Budget("whiten, moments of all tiles", _WHITEN, "combine_kernel", "tile", 1, 0,
           {r"LDG\.E\.64": 2}, 0,
           Limit(15.0, 32, 32, 1, 2, 0), Limit(13.0, 32, 32, 1, 2, 0), threads=1024, loop=True),
    # A group of a given size of up to 32, by a warp: its mean, its spread and its advantages.
    Budget("group_advantages, mean and spread of a group, fp32", _GROUPS, "group_kernel", "reward",
           1, 0, {r"LDG\.E ": 4, "SHFL": 20, r"STG\.E ": 1, r"MUFU\.RCP64H": 3}, 8,
           Limit(382.0, 48, 20, 6, 7, 2), Limit(368.0, 72, 14, 7, 11, 1), threads=128),
    Budget("group_advantages, spread of the batch", _GROUPS, "batch_kernel", "reward", 4, 0,
           {r"LDG\.E\.64": 4, "STG": 4}, 0,
           Limit(29.0, 42, 8, 4, 4, 4), Limit(23.8, 37, 8, 4, 4, 4), threads=1024, loop=True),
    # A token that is kept takes 15 fused multiplications and additions, 13 without weights.
    Budget("mismatch_weights of tokens, fp32", _MISMATCH, "tile_kernel<true>", "token", 8, 0,
           _tokens(4, 2, {"FFMA": 120}), 14,
           Limit(150.0, 64, 64, 2, 2, 8), Limit(146.0, 64, 64, 2, 2, 8)),
    Budget("mismatch_weights of sequences, fp32", _MISMATCH, "tile_kernel<false>", "token", 8, 0,
           _tokens(4, 0, {"FFMA": 104}), 10,
           Limit(119.5, 54, 64, 2, 2, 8), Limit(118.0, 56, 64, 2, 2, 8)),
    # One block judges all sequences, each thread every 256th of them: an iteration adds a tile.
    Budget("mismatch_weights, sums of sequences", _MISMATCH, "judge_kernel", "tile", 1, 0,
           {r"LDG\.E ": 24}, 0,
           Limit(255.0, 128, 10, 7, 26, 2), Limit(245.0, 128, 8, 9, 24, 2), loop=True),
    Budget("mismatch_weights of tokens, normalised", _MISMATCH, "finish_kernel", "token", 4, 0,
           {r"LDG\.E ": 4, r"STG\.E ": 4, r"MUFU\.RCP": 4}, 8,
           Limit(14.3, 24, 8, 4, 4, 4), Limit(18.3, 25, 8, 4, 4, 12), loop=True),
    Budget("policy_loss with gradient, clip, fp32", "policy.cu", "policy_kernel<0, false>",
           "token", 8, 0, _tokens(6, 2, {"F2I": 8, "FADD": 104, "BAR": 2}), 17,
           Limit(128.5, 96, 48, 2, 2, 0), Limit(123.8, 103, 48, 2, 2, 0)),
    # With a gate every token has the exponentials of both its probabilities. Since a sequence's
    # distance has a row of its own, so that infinities do not spoil it, a thread executes one
    # instruction more on sm_90, 145.125 -> 145.25 and 197.0 -> 197.125 per token, and six less on
    # sm_100.
    Budget("policy_loss with gradient and weights, fp32", "policy.cu", "policy_kernel<0, true>",
           "token", 8, 0, _tokens(8, 2, {"F2I": 8, "FADD": 104}), 21,
           Limit(145.3, 112, 96, 2, 2, 0), Limit(146.3, 115, 96, 2, 2, 0)),
    Budget("policy_loss with gradient and everything given, gate tv, fp32", "policy.cu",
           "policy_kernel<0, true>", "token", 8, 0, _tokens(14, 2, {"F2I": 24}), 33,
           Limit(197.2, 112, 112, 2, 2, 0), Limit(199.4, 115, 112, 2, 2, 0)),
    Budget("policy_loss, statistics of sequences, fp32", "policy.cu",
           "statistics_kernel<false, false>",
           "token", 8, 0, _tokens(4, 0, {"BAR": 2}), 9,
           Limit(34.9, 40, 96, 1, 2, 0), Limit(31.4, 44, 80, 1, 2, 0)),
    Budget("policy_loss, slopes of sequences, fp32", "policy.cu", "pooled_kernel<false>",
           "token", 8, 0,
           _tokens(2, 2, {}), 9,
           Limit(33.3, 43, 40, 2, 2, 0), Limit(34.0, 40, 48, 2, 2, 0)),
    Budget("value_loss with gradient, fp32", "value.cu", "value_kernel", "token", 8, 0,
           _tokens(6, 2, {"FFMA": 16, "BAR": 4}), 17,
           Limit(63.3, 64, 96, 2, 2, 0), Limit(62.9, 71, 72, 2, 2, 0)),
    Budget("loss backward, fp32", "policy.cu", "backward_kernel<F32>", "token", 8, 0,
           _tokens(2, 2, {}, step=None), 8,
           Limit(6.8, 26, 64, 2, 2, 0), Limit(5.8, 20, 64, 2, 2, 0)),
    Budget("loss backward, bf16", "policy.cu", "backward_kernel<BF16>", "token", 16, 0,
           _tokens(4, 2, {}, step=None), 6,
           Limit(4.5, 32, 128, 2, 2, 0), Limit(4.0, 28, 128, 2, 2, 0)),
    # Beside the kernels of a row: each of a lane's labels, and, where labels have gradients, 32
    # others that may be equal to it.
    Budget("token_logprobs of several labels, bf16", _MANY, "labels_kernel<BF16>", "label", 1, 0,
           {r"LDG\.E\.64": 1, r"LDG\.E\.U16": 1, "STG": 1}, 14,
           Limit(72.0, 40, 12, 2, 2, 1), Limit(47.0, 40, 12, 2, 2, 1), threads=128, loop=True),
    Budget("token_logprobs of several labels backward, equal labels", _MANY,
           "label_gradients_kernel<BF16>", "pair of labels", 32, 0, {r"LDS\.128": 8}, 0,
           Limit(3.5, 58, 0, 0, 0, 0), Limit(3.6, 56, 0, 0, 0, 0), threads=128, loop=True),
    Budget("token_logprobs of several labels backward, bf16", _MANY, "label_gradients_kernel<BF16>",
           "label", 1, 0, {r"LDG\.E\.64": 1, r"LDG\.E\.U16": 1, "STG": 1}, 18,
           Limit(98.0, 58, 8, 2, 2, 1), Limit(90.0, 56, 9, 3, 3, 1), threads=128, loop=True),
    Budget("token_logprobs of several labels backward, stores of bf16", _MANY,
           "scatter_kernel<BF16>", "label", 1, 0, {r"LDG\.E\.64": 2, "STG": 1}, 18,
           Limit(31.0, 30, 16, 2, 2, 1), Limit(27.0, 26, 16, 2, 2, 1), threads=128, loop=True),
    # Products of a weight's kept rows, lists of kept tokens, and sums of rows. The compiler takes
    # two or more entries of a list in an iteration.
    Budget("support, products, bf16", _SUPPORT, "products_kernel<BF16>", "column", 16, 0,
           {r"LDG\.E\.128": 4}, 2,
           Limit(4.5, 32, 128, 1, 0, 0), Limit(4.1, 32, 96, 2, 0, 0), loop=True),
    Budget("support, logits of a list, bf16", _SUPPORT, "rows_kernel<BF16>", "entry", 1, 0,
           {r"LDG\.E\.64": 1, r"LDG\.E\.U16": 1, "STG": 1}, 14,
           Limit(71.0, 44, 10, 3, 3, 1), Limit(71.0, 60, 8, 3, 3, 1), threads=128, loop=True),
    Budget("support, sums of a list", _SUPPORT, "rows_kernel<BF16>", "iteration", 1, 0,
           {r"MUFU\.EX2": 1}, 0,
           Limit(40.0, 44, 10, 1, 2, 0), Limit(126.0, 60, 32, 1, 8, 0), threads=128, loop=True),
    Budget("support backward, a list", _SUPPORT, "gradient_kernel", "entry", 1, 0,
           {r"MUFU\.EX2": 1, "STG": 1, r"LDG\.E\.64": 1}, 16,
           Limit(55.0, 63, 8, 2, 2, 1), Limit(61.0, 48, 11, 2, 3, 1), threads=128, loop=True),
    Budget("support backward, sums of rows, bf16", _SUPPORT, "sums_kernel<BF16>", "column", 32, 0,
           {r"LDG\.E\.128": 4, r"LDG\.E\.64": 8}, 2,
           Limit(8.1, 96, 40, 3, 12, 0), Limit(8.4, 119, 32, 3, 12, 0), threads=128, loop=True),
    # The two passes over a row: an iteration of each of the kernel's loops. The second reads what
    # the first left in L2. Where a narrow store is allowed it is the label's, by one lane of a row.
    Budget("policy_rows, sums, fp32", _ROWS, "rows_kernel<BF16, false, false>", "logit", 32, 1024,
           _row(8, 32), 4,
           Limit(9.7, 64, 128, 1, 0, 0), Limit(9.3, 64, 128, 1, 0, 0), threads=512, loop=True),
    Budget("policy_rows, gradient, bf16 of fp32", _ROWS, "rows_kernel<BF16, false, false>",
           "logit", 16, 512, _row(4, 16, 2), 2,
           Limit(8.4, 64, 64, 1, 0, 0), Limit(8.3, 64, 64, 1, 0, 1), threads=512, loop=True),
    Budget("policy_rows + entropy, gradient, bf16 of fp32", _ROWS, "rows_kernel<BF16, true, false>",
           "logit", 16, 512, _row(4, 16, 2), 2,
           Limit(10.4, 64, 64, 1, 0, 0), Limit(10.3, 64, 64, 1, 0, 1), threads=512, loop=True),
)
# fmt: on
