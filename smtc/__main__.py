"""`python -m smtc` and `torchrun -m smtc` are the `smtc` command."""

from smtc.cli import main

if __name__ == "__main__":
    main()
