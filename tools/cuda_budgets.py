"""What the machine code of csrc/cuda's main kernels may cost: the table that cuda_sass checks.

Limits are of the fast path of aligned, whole tiles; the largest vocabulary in use sets what tiles
waste. A limit is tightened when its kernel gets better, and never widened to pass.
"""

from dataclasses import dataclass

# Of Qwen's models.
VOCABULARY = 151_936


@dataclass(frozen=True)
class Limit:
    """The most instructions per unit, registers, waits for loads, and loads and stores of less
    than 16 bytes; the least KiB of loads in flight on a multiprocessor."""

    instructions: float
    registers: int
    in_flight: int
    waits: int
    narrow_loads: int
    narrow_stores: int


@dataclass(frozen=True)
class Budget:
    """A kernel, its fast path and its limits. A thread works on `units` of it; the path executes
    at least holds[pattern] operations of each pattern. `columns` of a row make a tile; 0 where
    tiles waste nothing."""

    name: str
    file: str
    kernel: str
    unit: str
    units: int
    columns: int
    holds: dict[str, int]
    sm_90: Limit
    sm_100: Limit
    threads: int = 256

    def limits(self, arch: int) -> Limit:
        """Those of sm_90 or sm_100."""
        return {90: self.sm_90, 100: self.sm_100}[arch]

    @property
    def waste(self) -> float:
        """Columns that the tiles of a row work on, by those that there are."""
        if self.columns == 0:
            return 1.0
        return -(-VOCABULARY // self.columns) * self.columns / VOCABULARY


def _row(slots: int, exponentials: int, stores: int = 0, **more: int) -> dict[str, int]:
    """What a path through a tile of logits holds, apart from `more`."""
    stored = {r"STG": stores} if stores else {}
    return {r"LDG\.E\.128": slots, r"MUFU\.EX2": exponentials} | stored | more


_LOGPROBS, _KL = "logprobs.cu", "kl.cu"

# fmt: off
BUDGETS = (
    Budget("token_logprobs, bf16", _LOGPROBS, "partial_kernel<BF16, false, false>", "logit",
           64, 16384, _row(8, 64),
           Limit(11.9, 79, 96, 2, 1, 0), Limit(10.4, 80, 96, 2, 1, 0)),
    Budget("token_logprobs + entropy, bf16", _LOGPROBS, "partial_kernel<BF16, false, true>",
           "logit", 64, 16384, _row(8, 64),
           Limit(13.3, 79, 96, 2, 1, 0), Limit(11.7, 80, 96, 2, 1, 0)),
    Budget("token_logprobs + entropy, fp32", _LOGPROBS, "partial_kernel<F32, false, true>",
           "logit", 32, 8192, _row(8, 32),
           Limit(14.0, 56, 128, 2, 1, 0), Limit(13.2, 60, 128, 2, 1, 0)),
    Budget("token_logprobs backward, bf16", _LOGPROBS, "backward_kernel<BF16, false, false>",
           "logit", 32, 8192, _row(4, 32, 4),
           Limit(18.7, 40, 108, 2, 6, 0), Limit(19.1, 48, 85, 2, 6, 0)),
    Budget("token_logprobs + entropy backward, bf16", _LOGPROBS,
           "backward_kernel<BF16, false, true>", "logit", 32, 8192, _row(4, 32, 4),
           Limit(19.7, 40, 108, 2, 6, 0), Limit(20.0, 48, 85, 2, 6, 0)),
    Budget("kl_divergence, bf16", _KL, "partial_kernel<BF16>", "pair", 32, 8192, _row(8, 64),
           Limit(32.8, 54, 128, 1, 0, 0), Limit(29.8, 80, 96, 1, 0, 0)),
    Budget("kl_divergence backward, reverse, bf16", _KL, "backward_kernel<BF16, true>", "pair",
           32, 8192, _row(8, 32, 4),
           Limit(24.9, 48, 160, 2, 4, 0), Limit(27.6, 48, 160, 2, 4, 0)),
    Budget("kl_divergence backward, forward, bf16", _KL, "backward_kernel<BF16, false>", "pair",
           32, 8192, _row(8, 64, 4),
           Limit(29.8, 58, 128, 2, 4, 0), Limit(31.1, 48, 160, 2, 4, 0)),
)
# fmt: on
