"""The benchmarks: `python -m benchmarks.run`, and what README.md of this folder lists."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
