"""The extension mechanism: what a block may be asked to do, and who asks it."""
