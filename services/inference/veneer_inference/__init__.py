"""The inference service: one resident base, many adapters, answers over gRPC."""
