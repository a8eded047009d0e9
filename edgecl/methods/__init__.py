"""What is minimised: losses, and SACL-XD as one object."""
