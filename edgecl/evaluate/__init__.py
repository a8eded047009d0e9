"""How good a net is with labels: kNN, linear probe, few labels, fine-tuning."""
