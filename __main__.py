"""`python -m latentmill`: the command, by the interpreter that is named."""

from latentmill.cli import main

if __name__ == "__main__":
    main()
