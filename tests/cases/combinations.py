"""Combinations of the values of several options."""

import itertools
from collections.abc import Iterator
from typing import Any


def products(**axes: tuple) -> Iterator[dict[str, Any]]:
    """Every combination of one value per axis."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def one_by_one(**axes: tuple) -> Iterator[dict[str, Any]]:
    """The first value of every axis; then each other value, with the first of all other axes."""
    first = {k: v[0] for k, v in axes.items()}
    yield first
    for axis, values in axes.items():
        yield from (first | {axis: v} for v in values[1:])


def pairs(**axes: tuple) -> Iterator[dict[str, Any]]:
    """A small set of combinations that contains every pair of values of two axes."""

    def pair(a: str, v: int, b: str, w: int) -> tuple:
        return (a, v, b, w) if a < b else (b, w, a, v)

    missing = {pair(a, v, b, w) for a, b in itertools.combinations(axes, 2)
               for v in range(len(axes[a])) for w in range(len(axes[b]))}  # fmt: skip
    while missing:
        a, v, b, w = min(missing)
        chosen = {a: v, b: w}
        for axis in sorted(axes.keys() - chosen.keys()):
            gains = [
                sum(pair(axis, i, other, j) in missing for other, j in chosen.items())
                for i in range(len(axes[axis]))
            ]
            chosen[axis] = gains.index(max(gains))
        missing -= {pair(*x, *y) for x, y in itertools.combinations(chosen.items(), 2)}
        yield {axis: axes[axis][chosen[axis]] for axis in axes}


def covering(**axes: tuple) -> Iterator[dict[str, Any]]:
    """The smallest set of combinations that contains every value of every axis."""
    for i in range(max(map(len, axes.values()), default=1)):
        yield {axis: values[i % len(values)] for axis, values in axes.items()}
