"""Where the trainer's ports meet the world: SQLite, Redis, files, and the dataset service."""
