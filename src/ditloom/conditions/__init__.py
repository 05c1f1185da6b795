"""Conditioners: what a user types in, to tensors; one file is one encoder."""
