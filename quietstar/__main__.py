"""`python -m quietstar COMMAND` is `quietstar COMMAND`."""

from quietstar_command import main

if __name__ == "__main__":
    raise SystemExit(main())
