"""The edge: protobuf messages in, domain values through, protobuf messages out."""
