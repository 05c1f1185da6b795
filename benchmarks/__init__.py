"""Benchmarks: each prints ratios against a peer measured in turn on the same machine."""
