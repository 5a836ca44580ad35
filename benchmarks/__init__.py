"""The benchmarks; README.md in this folder lists its programs, such as `benchmarks.run`."""

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the description with its line breaks."""
    kind = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=kind)


def divided(words: list[str]) -> tuple[list[str], list[str]]:
    """A program's own arguments, and those for pytest after "--"."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]
