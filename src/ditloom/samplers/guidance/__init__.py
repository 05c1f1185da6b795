"""Rules that make one estimate of several predictions."""
