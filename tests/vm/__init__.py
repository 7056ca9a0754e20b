"""Tests of the package on a Debian in a virtual machine, from its installation to its removal."""
