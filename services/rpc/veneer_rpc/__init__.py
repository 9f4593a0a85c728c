"""gRPC plumbing that every service shares: what happens at the edge of a process, and nothing of its domain.

Free of grpc and protobuf, so that a domain may import them: `errors`, `names`, `paging`, `idempotency`,
`calls`. For both ends of a connection: `channel`, `status`, `delegation`, `addresses`. For a server process
only: the rest.
"""
