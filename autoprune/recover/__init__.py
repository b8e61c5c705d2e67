"""What mends the chosen candidates."""
