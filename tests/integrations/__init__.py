"""The patches of TRL, verl and OpenRLHF."""
