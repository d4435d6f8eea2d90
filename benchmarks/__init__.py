"""How fast the helpers are, as ratios of medians measured in one run: `make bench`.

Everything is timed in one process of an environment of its own (build/bench/venv, pinned by requirements.txt), in which
repeng and nnsight work with the same torch and transformers as the helpers. Four questions:

- Extraction at all sites, last token, against a plain batched forward pass with logits in arrival order.
- The same against repeng's and nnsight's extraction, in arrival order and with the same batch size.
- Generation with one vector added against generation without.
- A sweep of doses decoded as one batch against one run a dose.

Before anything is timed the contenders' states are compared: they must be the same numbers. Repetitions are interleaved
with a rotating order; a ratio is that of the medians, its spread the smallest and the largest ratio of one repetition.
`subject` holds the model and the prompts, `contenders` what is timed, `measure` how. Nothing here passes or fails by
time: a target missed is printed as missed.
"""
