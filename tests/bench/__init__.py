"""What portward promises in figures, each measured by a function here: `make bench`."""
