"""Disks and object stores behind one interface."""
