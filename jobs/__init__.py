"""From prompts to a verified dataset: plans, executors, commit records, and what is done with the result."""
