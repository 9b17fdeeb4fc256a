"""A run on disk: its folder, its checkpoints, and the trainer that writes and resumes them."""
