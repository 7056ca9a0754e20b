"""Tests of the package on a Debian 12 in a virtual machine, from its installation to its removal."""
