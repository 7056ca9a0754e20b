"""The programs that run inside the machine. They use Debian's own Python and its standard library only."""
