"""What training is, free of transport and storage."""
