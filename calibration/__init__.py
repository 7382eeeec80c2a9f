"""Representative data and what is learned from it."""
