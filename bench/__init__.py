"""The benchmarks: figures of this machine, each with the command that made it. Nothing imports them but their tests."""
