"""Ways around a block of port 25, each tried through a real kernel against a real listener."""
