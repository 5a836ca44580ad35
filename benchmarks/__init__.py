"""The benchmarks: `python -m benchmarks.run`, and what README.md of this folder lists."""

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Of a program whose help is its docstring as it stands."""
    kind = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=kind)


def divided(words: list[str]) -> tuple[list[str], list[str]]:
    """A program's own arguments, and pytest's, which follow "--"."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]
