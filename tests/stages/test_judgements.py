"""Judgements are kept, those that a judge left out are asked for again, and fluency is of first draws alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from studied import PROFILE, WIDTH

from helpers.data.atlas_task import AtlasTask
from helpers.lm import decoding
from helpers.stages import artifacts, judgements
from helpers.stages.sampled import Answers
from helpers.study import Study

DELTAS = torch.full((1, WIDTH), 3.0)  # answers that no other test asks for


def test_answers_that_a_judge_left_out_are_judged_in_the_next_session_and_not_sampled_again(trained, monkeypatch):
    """A judge whose budget was spent says nothing of an answer: nan."""
    judgement, spent = AtlasTask.judgement, [True]

    def judge(task, pair, answer):
        return judgement(task, pair, answer) | ({"preferred": float("nan")} if spent[0] else {})

    monkeypatch.setattr(AtlasTask, "judgement", judge)
    first = trained.sweep("base", "final", DELTAS)
    assert first["preferred"].isna().all()
    spent[0] = False
    monkeypatch.setattr(decoding, "sample", lambda *_, **__: pytest.fail("sampled again"))

    def again():
        return Study(PROFILE).sweep("base", "final", DELTAS)

    assert again()["preferred"].isna().all()  # this session has asked
    monkeypatch.setattr(artifacts, "_tried_here", set())
    assert again()["preferred"].notna().all() and again()["ids"].tolist() == first["ids"].tolist()


def test_fluency_is_of_each_arms_first_draw_whatever_the_others_say(monkeypatch):
    """A later draw of one arm may be what another says first."""
    monkeypatch.setattr(decoding, "texts", lambda _, answers: list(map(str, answers)))
    monkeypatch.setattr(judgements, "_token_losses", lambda base, prompts, ids, most: np.array(list(map(len, ids))))
    task = SimpleNamespace(judgements=lambda pairs, texts: [{"preferred": 1.0} for _ in texts])
    said = [[[0, 1], [1, 2]], [[1, 2], [0, 0]]]  # of two arms, two draws, two prompts
    answers = Answers([[5], [5, 6, 7], [5, 6, 7, 8, 9]], said)
    base = SimpleNamespace(tokenizer=lambda: None)
    table = judgements.judgement_table(task, ["a", "b"], [[1], [2]], answers, 9, base)
    assert table["token_loss"].tolist() == [1, 3, 3, 5]
    assert table["ids"].map(len).tolist() == [1, 3, 3, 5]
