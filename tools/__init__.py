"""Programs that are not tests, run as `python -m tools.NAME` from the repository.

It also holds what tests and benchmarks share: stubs for OpenRLHF, batches of policy losses.
"""
