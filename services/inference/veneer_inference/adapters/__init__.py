"""What the replica reaches outward for: the registry, adapters and pictures, and its own disk."""
