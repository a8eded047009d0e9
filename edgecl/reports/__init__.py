"""From directories to one page a person can read."""
