"""What happens to a frame: every function here is jitted."""
