"""Programs that are not tests; run as `python -m tools.NAME` from the repository."""
