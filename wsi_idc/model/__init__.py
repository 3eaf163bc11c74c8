"""The model: its network, its bundle, and what runs it."""
