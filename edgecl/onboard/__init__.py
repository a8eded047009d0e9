"""What runs on a device: the grammar of Python 3.6, the standard library, NumPy and the device's runtime."""

import os

# onnxruntime reads this while it is imported. Without it a file is written under the user's home, and a host is looked up.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
