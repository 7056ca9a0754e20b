"""A program that takes all file descriptors of the agent, from within."""
