"""Drop-in for trainers: `trl`, `verl` and `openrlhf`, each with patch(), unpatch() and patched().

Nothing is imported or replaced before patch() is called.
"""
