"""Judgements are kept, and those that a judge left out are asked for again."""

import pytest
import torch
from studied import PROFILE, WIDTH

from helpers.data.atlas_task import AtlasTask
from helpers.lm import decoding
from helpers.stages import artifacts
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
