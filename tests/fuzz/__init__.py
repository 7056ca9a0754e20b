"""Packets that nobody would think of: at the parser, and through the real queue."""
