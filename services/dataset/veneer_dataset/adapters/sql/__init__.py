"""Metadata in a relational database: SQLite by default, PostgreSQL by URL."""
