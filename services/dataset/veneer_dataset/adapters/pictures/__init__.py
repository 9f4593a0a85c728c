"""Decoding and resizing, in child processes with limits: a picture may kill its decoder, not the service."""
