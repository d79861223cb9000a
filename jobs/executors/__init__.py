"""Who runs the chunks: this process, or the actors of a Ray cluster."""
