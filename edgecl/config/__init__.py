"""Recipes and targets: TOML files, their fields, and how they are read."""
