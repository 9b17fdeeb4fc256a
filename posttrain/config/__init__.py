"""The configuration: its schema, the check that it passes, and what TRL's trainers take."""
