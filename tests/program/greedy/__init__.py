"""A module that makes the agent use all its file descriptors, from within its process."""
