"""Parity presets: each trainer's policy loss, in that trainer's own argument names.

They are the constructors `PolicyLossConfig.trl`, `.verl`, `.openrlhf`, `.nemo_rl`, `.skyrl`,
`.prime_rl`, `.areal`, `.slime` and `.tinker`. An option that our options cannot express raises
ValueError, which says what to pass instead; nothing is approximated silently. Two differences from
every trainer are by design: a log-ratio saturates at +-40, before exp() overflows, and a batch
without unmasked tokens has the loss 0, not NaN. What differs for one trainer alone is in its
docstring.

Each file also lists the advantages that go with its losses: `m` is the mask, `r` are rewards [B],
`G` is the size of a group, `ids` are group ids.
"""
