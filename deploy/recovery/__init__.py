"""Training that earns accuracy back after pruning."""
