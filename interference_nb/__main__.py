"""Run the command line as `python -m interference_nb`."""

# Written by hand: it would run wherever a notebook's cells are run.
from .cli import main

if __name__ == '__main__': main()
