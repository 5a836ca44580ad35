"""Programs that are not tests, run as `python -m tools.NAME` from the repository.

And what tests and benchmarks share: OpenRLHF without its dependencies, batches of policy losses.
"""
