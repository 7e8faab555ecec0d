"""``python -m pwopt``: the same as the command ``pwopt``."""

from pwopt.cli import main

if __name__ == "__main__":
    main(prog_name="pwopt")
