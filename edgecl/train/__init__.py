"""The training loop and what it stands on: optimiser and monitoring."""
