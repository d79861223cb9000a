"""Disks and object stores behind one door."""
