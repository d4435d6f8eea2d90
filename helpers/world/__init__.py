"""The atlas, and the organism that learns it."""
