"""What every test of the trainer starts from."""

import sys

import pytest


@pytest.fixture(autouse=True)
def own_precision():
    """accelerate shares its state over a process; no test inherits the precision of another."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        shared = state.AcceleratorState._shared_state
        if shared.get("_mixed_precision", "no") != "no":
            state.AcceleratorState._reset_state()
