"""What the mains about sparse attention share."""
