"""Runs the command line for `python -m llamita` and `torchrun -m llamita`."""

from llamita.cli import main

if __name__ == "__main__":
    main()
