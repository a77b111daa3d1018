"""`python -m reconciler` is the command `fleet`."""

from reconciler.cli import main

main()
