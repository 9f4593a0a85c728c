"""What the service knows of rows, pictures and versions; free of transport and storage."""
