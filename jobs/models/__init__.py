"""Models by preset, path, URL or hub id, and their files on this machine, verified by hash."""
