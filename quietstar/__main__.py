"""`python -m quietstar COMMAND` is `quietstar COMMAND`."""

from quietstar.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
