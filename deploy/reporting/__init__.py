"""What a person reads after a build."""
