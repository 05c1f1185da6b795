"""Data sources, their order and the batches made of them."""
