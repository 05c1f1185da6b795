"""What a block is made of. Parts are leaves: they know tensors, never a family."""
