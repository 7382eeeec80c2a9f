"""Whether a rung's artifact answers as its module does."""
