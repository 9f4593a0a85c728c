"""What the child of an export does: write the model, ask it, hold it against the adapter."""
