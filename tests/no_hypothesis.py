"""Stands in for hypothesis where that is not installed: its tests skip, the others run."""

import enum
import sys

import pytest


class HealthCheck(enum.Enum):
    function_scoped_fixture = 1


class settings:
    def __init__(self, *args, **options):
        pass

    def __call__(self, test):
        return test

    register_profile = load_profile = staticmethod(lambda *args, **options: None)


def given(*args, **strategies):
    def decorate(test):
        # Without the test's parameters, which pytest would take for fixtures.
        def skipped():
            pytest.skip("hypothesis is not installed")

        skipped.__name__ = test.__name__
        return skipped

    return decorate


def __getattr__(name):
    """`strategies`, and every strategy in it."""
    if name.startswith("__"):
        raise AttributeError(name)
    return sys.modules[__name__] if name == "strategies" else lambda *args, **options: None
