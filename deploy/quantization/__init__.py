"""Which operators may become integers."""
