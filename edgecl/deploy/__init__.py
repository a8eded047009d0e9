"""From a model directory to a bundle, and measuring it."""
