"""What keeps the graph up to date by itself, and what it would do."""
