"""The dataset service: blobs by SHA-256, checked rows frozen as versions, and examples read out of them."""
