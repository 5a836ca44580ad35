"""Shared foundations: environment variables, checks, tensor layout, process groups."""
