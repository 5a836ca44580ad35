"""Our operations against the code of TRL, verl and OpenRLHF."""
