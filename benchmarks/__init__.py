"""How fast the helpers are, as ratios of medians measured in one run: `make bench`.

Everything is timed in one process of an environment of its own (build/bench/venv, pinned by requirements.txt), in
which repeng and nnsight work with the same torch and transformers as the helpers. Before anything is timed the
contenders' states are compared: they must be the same numbers. Repetitions are interleaved with a rotating order.
`subject` holds the model and the prompts, `contenders` what is timed, `measure` how; `exports` checks a vector in
repeng. Nothing here passes or fails by time: a target missed is printed as missed.
"""
