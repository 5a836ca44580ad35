"""Backends with other launchers than their own."""

import contextlib
import dataclasses
from collections.abc import Iterator

from rlhf_kernels.kernels import backends


@contextlib.contextmanager
def with_launchers(name: str, **launchers: object) -> Iterator[None]:
    """A backend with other launchers by name; None leaves one out."""
    own = backends.get(name)
    others = {k: f for k, f in {**own.launchers, **launchers}.items() if f is not None}
    before = backends.install(dataclasses.replace(own, launchers=others))
    try:
        yield
    finally:
        backends.install(before)
