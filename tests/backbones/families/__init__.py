"""What the shared tests must know of each family: one file per family, found by its name."""
