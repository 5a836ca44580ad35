"""The package: its shape, build, installation, doctor and README."""
