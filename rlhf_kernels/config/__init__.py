"""The configuration of the policy loss, and the presets of trainers."""
