"""How a number becomes evidence: resamples of what prompts share, and verdicts by rule."""
