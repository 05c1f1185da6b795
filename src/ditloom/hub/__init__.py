"""Weights of other code bases, in both directions."""
