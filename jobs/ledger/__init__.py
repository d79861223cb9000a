"""Commit records and pictures: what is written once, and trusted."""
