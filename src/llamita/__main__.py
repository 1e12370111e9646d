"""`python -m llamita`, which `torchrun -m llamita` rests on."""

from llamita.cli import main

if __name__ == "__main__":
    main()
