"""What the tool costs and what it gains, measured: see docs/performance.md."""
