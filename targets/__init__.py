"""What hardware is and can do: plain data, no torch."""
