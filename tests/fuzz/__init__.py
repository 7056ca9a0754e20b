"""Random packets, given to the parser and sent through the real queue."""
