"""Ways to train without labels, one file each: its name is the method's, `METHOD` its class, `Config` its settings."""
