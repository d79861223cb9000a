"""`python -m latentmill`: the command, by the interpreter that is named."""

import sys

if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036 - a cluster may run this where nothing was installed
        sys.exit(f"error: latentmill needs Python 3.11 or later; {sys.executable} is {sys.version.split()[0]}")
    if not sys.flags.safe_path:
        del sys.path[0]  # Python's `-m` puts the current folder there: a torch.py in it is none of ours
    try:
        from latentmill.cli import main

        main()
    except ModuleNotFoundError as error:
        if (error.name or "latentmill").startswith("latentmill"):
            raise  # a mistake of ours: the traceback is what a report needs
        sys.exit(f"error: {sys.executable} has no module {error.name}; install latentmill and its packages for it")
