"""KL in parts, where the distributions of all answers do not fit into memory."""

import pytest

from helpers.lm import likelihoods
from helpers.stages import divergences


def test_kl_is_the_same_however_many_answers_are_kept_in_memory(trained, deltas, monkeypatch):
    role, goal = trained.lm.role("base"), trained.lm.role("dpo")
    answered = trained.encoded("heldout")[0]
    together = divergences.divergences(role, goal, answered, deltas)
    parts, kl_to = [], likelihoods.kl_to
    monkeypatch.setattr(likelihoods, "MAX_LOGITS", 1)
    monkeypatch.setattr(likelihoods, "kl_to", lambda *given: parts.append(given[2]) or kl_to(*given))
    own = deltas[:, None].expand(-1, len(answered), -1)  # another key, the same deltas
    apart = divergences.divergences(role, goal, answered, own.contiguous())
    assert parts == [[tokens] for tokens in answered]
    assert apart["kl"].tolist() == pytest.approx(together["kl"].tolist(), abs=1e-5) and apart["kl"].max() > 0
