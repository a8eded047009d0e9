"""Train, then compile: small vision networks from unlabelled images, measured on the device that runs them.

Importing edgecl imports nothing heavy. Each verb of the command line is one function in one module,
for example `from edgecl.nets.carving import carve`; `docs/architecture.md` lists them.
"""

__version__ = "0.3.0"
__all__ = ["__version__"]
