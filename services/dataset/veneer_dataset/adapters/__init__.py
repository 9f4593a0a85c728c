"""What the domain's ports stand for outside: files, databases, child processes, other services."""
