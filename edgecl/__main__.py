"""`python -m edgecl` is the command `edgecl`."""

from edgecl.cli import main

if __name__ == "__main__":
    main()
