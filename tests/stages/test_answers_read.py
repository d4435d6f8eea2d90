"""States of given answers and their log-probabilities, by plain forward passes one at a time."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, random_ids, recorded
from studied import logp

from helpers.lm.batches import Tokens
from helpers.stages.answers_read import answer_logps, answer_states
from helpers.stages.roles import Role

pytestmark = pytest.mark.usefixtures("cache")
ANSWERS = [Tokens(random_ids(n, n), random_ids(k, 50 + k)) for n, k in ((1, 4), (6, 1), (3, 9), (3, 2))]


@pytest.fixture
def role(model, model_type):
    """A model as it is handed to stages; its tokenizer is asked for by none of these."""
    return Role("base", model_type, lambda: nullcontext(model), lambda: None)


def test_states_are_those_over_an_answer_and_those_that_predict_it(role, model, model_type):
    found = answer_states(role, ANSWERS)
    for i, tokens in enumerate(ANSWERS):
        with recorded(model, ARCHITECTURES[model_type][1]) as states, torch.no_grad():
            model(input_ids=torch.tensor([tokens.ids]))
        n = len(tokens.prompt)
        at = states["final"][0]
        torch.testing.assert_close(found["mean"][i], at[n:].mean(0), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found["sum"][i], at[n - 1 : -1].sum(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "empty, message", [(Tokens([5], []), "An answer is empty"), (Tokens([], [5]), "Prompt 1 is empty")]
)
def test_what_is_empty_is_refused(llama, empty, message):
    role = Role("base", "llama", lambda: nullcontext(llama), lambda: None)
    with pytest.raises(ValueError, match=message):
        answer_states(role, [ANSWERS[0], empty])


def test_log_probabilities_are_those_of_a_plain_forward_pass(llama):
    role = Role("base", "llama", lambda: nullcontext(llama), lambda: None)
    expected = [logp(llama, tokens) for tokens in ANSWERS]
    np.testing.assert_allclose(answer_logps(role, ANSWERS), expected, rtol=1e-4)
