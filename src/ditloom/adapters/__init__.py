"""Live models of other libraries on the same mechanism: their blocks are called, their parameters shared."""
