"""What a run leaves in its directory, and the machine that it runs on; torch-free."""
