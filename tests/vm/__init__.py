"""A Debian 12 in a virtual machine: the package as it is deployed, from power-on to its removal."""
