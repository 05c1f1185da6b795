"""Networks that turn pictures into the vectors in which metrics compare them; one file each."""
