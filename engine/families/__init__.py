"""What makes each family of models: one file a family, one entry in the table."""
