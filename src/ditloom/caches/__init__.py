"""Feature caches: what a sampling step may take over from, or predict by, the steps before it."""
