"""What makes a checkpoint, and what scores it."""
