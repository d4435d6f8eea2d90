"""Entries of a ledger, made up."""

import math


def entry(interval=(0.9, 1.1), region=(0.8, 1.2), no_effect=0.0, value=None, beyond=None, name="C6", missing=None):
    """A made-up entry of the ledger."""
    low, high = interval
    return {
        "id": name, "prediction": [None if math.isinf(end) else end for end in region], "no_effect": no_effect,
        "value": (low + high) / 2 if value is None else value, "ci_low": low, "ci_high": high, "df": None,
        "beyond": {control: [*found, None] for control, found in (beyond or {}).items()}, "missing": missing or {},
    }  # fmt: skip
