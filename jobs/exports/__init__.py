"""A published dataset in other tools' forms: one file and one entry of the table for each."""
