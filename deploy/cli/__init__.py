"""The command: one file a verb, each a thin layer over a function."""
