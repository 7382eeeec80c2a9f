"""Runtimes that need an environment of their own: made on demand, spoken to over a pipe."""
