"""What a person implements to extend ditloom: one contract per file."""
