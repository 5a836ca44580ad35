"""Bytes that linear_policy_loss moves on a GPU, and what they let its time be.

For a loss whose tokens stand alone, with bfloat16 operands: three products, and row kernels over
each chunk's logits. CUDA's one kernel (csrc/cuda/policy_rows.cu) reads these from memory once, and
then from L2; the three kernels that it stands for, which Triton has, read them twice. The tests of
the head count the same bytes. Times are predictions: nothing was measured.
"""

from typing import NamedTuple

from tools.tables import table

#: The design's shape of a head: tokens, width and vocabulary, in chunks of so many tokens.
TOKENS, WIDTH, VOCABULARY, CHUNK = 8192, 4096, 151_936, 4096
#: Name -> bfloat16 TFLOP/s of the data sheet (dense), copy rate in TB/s.
GPUS = {"H100": (989, 3.0), "H200": (989, 4.3), "B200": (2250, 7.2)}
# What a large product reaches of it: an assumption.
PRODUCT_SHARE = 0.75


class Traffic(NamedTuple):
    """Bytes of a call, all upstream gradients being 1.

    bare: of three products alone, all tokens at once, results in 16 bits.
    products: of the head's products.
    rows: of logits and their gradient to and from row kernels.
    rounding: of the weight's fp32 gradient to 16 bits.
    """

    bare: int
    products: int
    rows: int
    rounding: int


def traffic(tokens: int, width: int, vocabulary: int, chunk: int, *, one_kernel: bool) -> Traffic:
    """The bytes of a head in chunks of `chunk` tokens, all of which have a gradient."""
    logits, weight, hidden = tokens * vocabulary, vocabulary * width, tokens * width
    chunks = -(-tokens // chunk)
    # Logits and hidden states' gradient: operands, results.
    first = 2 * hidden + 2 * weight * chunks + 4 * logits
    second = 2 * logits + 2 * weight * chunks + 2 * hidden
    # The weight's gradient: in its own dtype at once, or written and then added to in fp32.
    sums = 2 * weight if chunks == 1 else 4 * weight + 8 * weight * (chunks - 1)
    third = 2 * logits + 2 * hidden + sums
    bare = 3 * 2 * (logits + weight + hidden)
    # Statistics read fp32; the gradient reads fp32, unless from L2, and writes 16 bits.
    rows = (6 if one_kernel else 10) * logits
    return Traffic(bare, first + second + third, rows, 6 * weight if chunks > 1 else 0)


def ratios(gpu: str, *, one_kernel: bool) -> tuple[float, float]:
    """The time of a call by that of its three products: with the bytes of products hidden behind
    their arithmetic, and with none hidden that bare products have not."""
    t = traffic(TOKENS, WIDTH, VOCABULARY, CHUNK, one_kernel=one_kernel)
    tflops, copy = GPUS[gpu]
    products = 3 * 2 * TOKENS * WIDTH * VOCABULARY / (PRODUCT_SHARE * tflops * 1e12)
    passes = (t.rows + t.rounding) / (copy * 1e12)
    added = (t.products - t.bare) / (copy * 1e12)
    return 1 + passes / products, 1 + (passes + added) / products


def markdown() -> str:
    """The table of the report."""
    one, three = (
        traffic(TOKENS, WIDTH, VOCABULARY, CHUNK, one_kernel=one_kernel)
        for one_kernel in (True, False)
    )
    bare, products, rows, rounding = (f"{x / 1e9:.1f} GB" for x in one)
    lines = [
        "",
        "## The head",
        "",
        f"`linear_policy_loss`, {TOKENS} tokens x {WIDTH} x {VOCABULARY}, bf16, chunks of {CHUNK}:",
        f"the one kernel over rows of logits moves {rows} to and from memory, three kernels move",
        f"{three.rows / 1e9:.1f} GB; rounding the weight's gradient moves {rounding}, products",
        f"{products};",
        f"three bare products move {bare}. The table has the time of a call, divided by that of",
        f"three bare products at {PRODUCT_SHARE:.0%} of the data sheet's rate. Least: the bytes of",
        "products are hidden behind their arithmetic. Most: only as many as bare ones move are.",
        "Row kernels are taken to move their bytes at the copy rate, and what the one kernel reads",
        "from L2 to take no time: L2 passes on as many bytes as before, at a rate not known here.",
        "",
    ]
    rows_of = [
        [name, *(f"{x:.2f}" for way in (True, False) for x in ratios(name, one_kernel=way))]
        for name in GPUS
    ]
    head = ("GPU", "one kernel: least", "most", "three kernels: least", "most")
    return "\n".join([*lines, *table(head, rows_of)]) + "\n"


if __name__ == "__main__":
    print(markdown())
