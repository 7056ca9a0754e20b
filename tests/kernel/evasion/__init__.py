"""Ways around a port-25 block, each sent through a real kernel at a real listener."""
