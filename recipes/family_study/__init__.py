"""A fair comparison of every image family at small scale."""
