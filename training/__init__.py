"""How the embedded model was made: data, first stage, second stage, export, evaluation.

Nothing imports this package; `python -m training` runs the recipe and `python -m training.evaluate` measures its
result.
"""
