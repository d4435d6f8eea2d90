"""What is asked of a study beyond the paper, an experiment a file."""
