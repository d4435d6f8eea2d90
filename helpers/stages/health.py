"""What a partner must show to be called healthy."""

from helpers.settings import Settings


class Health(Settings):
    """What a DPO partner must show on validation prompts to be called healthy. Thresholds, fixed before measuring."""

    min_reward_accuracy: float = 0.95
    min_preferred: float = 0.8
    max_fact_loss: float = 0.05  # where facts are known by rule
    min_well_formed: float = 0.97  # where well-formedness is known by rule
    max_perplexity_ratio: float = 2.0  # where it is not: perplexity under the base, against the base's own samples
