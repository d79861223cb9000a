"""Scores of pictures: the table of scorers, and the files beside a dataset that hold their columns."""
