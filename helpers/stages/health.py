"""What a partner must show to be called healthy."""

from helpers.settings import Settings


class Health(Settings):
    """What a partner's answers to validation prompts must keep for it to be called healthy. Thresholds, fixed before
    measuring."""

    max_fact_loss: float = 0.05  # where facts are known by rule
    min_well_formed: float = 0.97  # where well-formedness is known by rule
    max_perplexity_ratio: float = 2.0  # where it is not: perplexity under the base, against the base's own samples
