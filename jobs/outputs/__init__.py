"""What is done with committed chunks: publish, verify, repair, clean, and say how far a job is."""
