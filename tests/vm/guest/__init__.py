"""What runs inside the machine, with Debian's own Python and nothing else."""
