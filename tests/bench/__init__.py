"""Measurements of the figures that portward promises: `make bench`."""
