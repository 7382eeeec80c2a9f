"""What an app or a server ships: a build's files with all that runs them."""
