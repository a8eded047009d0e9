"""What edgecl leaves on the disk: directories, records, checkpoints, and how they are read back."""
