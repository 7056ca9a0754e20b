"""portward: who may open connections to TCP port 25, held on Linux virtual network gateways."""

__version__ = "0.1.0"
