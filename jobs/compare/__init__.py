"""Two published datasets side by side: which samples are the same, changed, new or gone, and by how much."""
