"""Prompt files of every kind as one stream of checked rows."""
