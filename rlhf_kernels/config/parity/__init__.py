"""Parity presets: each trainer's policy loss, in that trainer's own argument names.

They are the constructors `PolicyLossConfig.trl`, `.verl` and `.openrlhf`. What our options cannot
express raises ValueError; nothing is approximated in silence. Two differences to every trainer are
by design: a log-ratio saturates at +-40, where exp() is on its way to infinity, and with nothing
unmasked the loss is 0, not NaN.

Each file also says which advantages go with its losses: `m` is the mask, `r` are rewards [B], `G`
is the size of a group, `ids` are group ids.
"""
