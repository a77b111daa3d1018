"""What touches the world. Each adapter implements one Protocol of `ports`."""
