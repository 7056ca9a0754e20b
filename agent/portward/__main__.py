"""`python -m portward`: the same as the program `portward`."""

from portward.cli import main

main()
