"""The command line: one reader, help, and what every entry point does at its start and its end."""
