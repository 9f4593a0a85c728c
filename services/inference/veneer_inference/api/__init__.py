"""The edge: what comes over the wire is checked and converted here, once."""
