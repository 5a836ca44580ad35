"""What everything above shares: environment, checks, layout, process groups."""
