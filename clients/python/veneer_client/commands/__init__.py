"""The client's commands, each a thin layer over `veneer_client.Client`; `cli` gathers them by entry point."""
