"""One language model: where it keeps its parts, loading, states, steering, likelihoods, decoding, training."""

import warnings

# PEFT 0.21.2 asks transformers 5.23.0 by an old name; nothing that a reader of a notebook could mend.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated", category=FutureWarning)
# Nor could they of PEFT's setting itself what GPT-2's transposed layers need.
warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but the target module is `Conv1D`")
