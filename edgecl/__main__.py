"""`python -m edgecl` is the command `edgecl`."""

from edgecl.cli import program

if __name__ == "__main__":
    program()
