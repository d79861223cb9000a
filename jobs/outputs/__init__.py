"""What is done with committed chunks: publish, verify, repair, sweep, and say how far a job is."""
