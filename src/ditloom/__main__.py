"""`python -m ditloom` is the command line."""

from ditloom.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
