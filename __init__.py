"""latentmill: prompts in, a verified image dataset out.

The repository's root is the package: `latentmill.cli`, `latentmill.jobs`, `latentmill.engine`, `latentmill.configs`.
"""
