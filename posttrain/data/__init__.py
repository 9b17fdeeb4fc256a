"""Rows: where they come from, which formats they have, and how they are tokenized."""
