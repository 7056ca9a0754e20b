"""The tests on Debian 13, with its Python 3.13, in a root of its own."""
