"""What runs on a device: the grammar of Python 3.6, the standard library, NumPy and the device's runtime."""
