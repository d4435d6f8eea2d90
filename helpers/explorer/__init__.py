"""What one dose does to one prompt, and the panel that shows it."""
