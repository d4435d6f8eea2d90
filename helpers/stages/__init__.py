"""What is computed once, a file a stage, and the cache."""
