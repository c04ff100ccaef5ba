"""`python -m kvrdma`: the command line."""

from kvrdma.cli import main

if __name__ == "__main__":
    main()
