"""Inputs for the tests of the operations: options, layouts, bad data, random draws."""
