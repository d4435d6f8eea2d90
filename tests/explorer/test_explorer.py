"""The explorer against plain forward passes, and its panel without a front end."""

import asyncio
import html
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from studied import PROFILE

from helpers.data.atlas_task import AtlasTask
from helpers.data.naming import PLAIN
from helpers.data.sizes import Sizes
from helpers.data.stories import StoryTask
from helpers.explorer import explorer, panel
from helpers.explorer.explorer import Explorer, Plane, Setting
from helpers.lm import encoding
from helpers.study import Study
from helpers.world import atlas

close = torch.testing.assert_close
same = partial(close, rtol=1e-3, check_dtype=False)
WORLD = atlas.Atlas()


@pytest.fixture(scope="module")
def e(trained):
    return Explorer(trained, lambda site, position: {"v*": 20 * trained.direction(site, position)})


@pytest.fixture(scope="module")
def prompt(trained):
    return trained.pairs["heldout"][0].prompt


@torch.no_grad()
def log_probabilities(model, ids, first, site, delta):
    """Of every next token, with delta added at a site from position `first` on, and what the unembedding reads."""

    def added(_, __, output):
        output[:, first:] += delta

    kept = []
    layers = model.model.layers
    module = model.model.norm if site == "final" else layers[int(site[6:-1]) - 1]
    hooks = [module.register_forward_hook(added)]
    hooks.append(model.lm_head.register_forward_pre_hook(lambda _, args: kept.append(args[0][0])))
    try:
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1), kept[0]
    finally:
        for hook in hooks:
            hook.remove()


# --- What is measured ---


@pytest.mark.parametrize("site", ["final", "resid[1]"])
@pytest.mark.parametrize("role, steered, sign", [("base", "steered", 1), ("dpo", "desteered", -1)])
def test_a_view_holds_what_plain_forward_passes_give(e, trained, plain, prompt, site, role, steered, sign):
    view = e.view(Setting(prompt, site, "prompt_last", "v*", 1.5))
    ids = encoding.encode(trained.lm.tokenizer, prompt).prompt
    delta = sign * 1.5 * 20 * trained.direction(site)
    for name, own in ((role, 0 * delta), (steered, delta)):
        told = view.told[name]
        greedy = list(ids)
        while len(greedy) < len(ids) + trained.profile.sizes.new_tokens:
            scores, _ = log_probabilities(plain[role], greedy, len(ids) - 1, site, own)
            greedy.append(scores[-1].argmax().item())
            if greedy[-1] == trained.lm.tokenizer.eos_token_id:
                break
        answer = greedy[len(ids) :]
        assert told.tokens == [e.token(i) for i in answer]
        before, _ = log_probabilities(plain[role], greedy, len(ids) - 1, site, 0 * delta)
        after, _ = log_probabilities(plain[role], greedy, len(ids) - 1, site, delta)
        at = (range(len(ids) - 1, len(greedy) - 1), answer)
        same(torch.tensor(told.changes), after[at] - before[at], atol=2e-3)
        scores, states = log_probabilities(plain[role], ids, len(ids) - 1, site, own)
        same(torch.tensor(told.next_token), scores[-1].exp(), atol=1e-4)
        same(told.state, states[-1], atol=1e-3)


def test_the_four_models_do_not_say_the_same_at_a_large_dose(e, prompt):
    """So that the test above is about something."""
    told = e.view(Setting(prompt, "final", "prompt_last", "v*", 1.5)).told
    assert list(told) == ["base", "steered", "desteered", "dpo"]
    assert told["steered"].tokens != told["base"].tokens and abs(told["base"].changes).max() > 0.1


def test_dose_zero_changes_nothing_at_all(e, prompt):
    told = e.view(Setting(prompt, "final", "prompt_last", "v*", 0.0)).told
    for plain, steered in (("base", "steered"), ("dpo", "desteered")):
        assert told[plain].tokens == told[steered].tokens and not told[steered].changes.any()
        assert torch.equal(told[plain].state, told[steered].state)


def test_a_sample_is_the_studys_own_for_the_first_prompt_and_another_with_another_seed(e, trained, prompt):
    at = Setting(prompt, "final", "prompt_last", "v*", 1.0, trained.profile.seed)
    told = {seed: e.view(replace(at, seed=seed)).told["base"].text for seed in range(3)}
    assert told[trained.profile.seed] == trained.answers_to([prompt])[0]
    assert len(set(told.values())) > 1


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"prompt": " \n"}, "The prompt is empty: type a question, or pick one."),
        ({"prompt": "what " * 500}, r"The prompt has \d+ tokens; the model's context of 128 has room for 118"),
        ({"direction": "v_token"}, r"There is no v_token at final: choose v\*."),
    ],
)
def test_what_cannot_be_shown_is_refused_in_a_sentence(e, prompt, changes, says):
    at = Setting(prompt, "final", "prompt_last", "v*", 1.0)
    with pytest.raises(ValueError, match=says):
        e.view(replace(at, **changes))


def test_a_prompt_is_read_as_it_is_spaces_included(e, trained):
    """The tokens of a story's opening end in a space; without it a model may end the story at once."""
    read, without = (encoding.encode(trained.lm.tokenizer, text).prompt for text in ("Tell me. ", "Tell me."))
    assert e._prompt("Tell me. ") == read != without


def test_the_longest_prompt_that_fits_is_answered(e, trained):
    room = 128 - trained.profile.sizes.new_tokens
    prompt = "a"
    while len(encoding.encode(trained.lm.tokenizer, prompt + "a").prompt) <= room:
        prompt += "a"
    assert len(encoding.encode(trained.lm.tokenizer, prompt).prompt) == room
    assert e.view(Setting(prompt, "final", "prompt_last", "v*", 1.0)).told["base"].tokens


def test_only_sites_that_dpo_moves_are_offered(e):
    assert e.sites == ["resid[1]", "resid[2]", "final"]


def test_the_plane_holds_v_and_is_centred_on_the_base(trained, e):
    v, base = trained.direction(), trained.states("heldout")["base", "final", "prompt_last"]
    plane = e.plane
    close(plane.axes @ plane.axes.T, torch.eye(2, dtype=torch.float64))
    np.testing.assert_allclose(plane.clouds["base"].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(plane.at(base + v) - plane.at(base), [[v.norm(), 0]] * len(base), atol=1e-5)


def test_the_second_axis_has_the_largest_spread_across_v():
    """Known by construction: v along the first coordinate, the clouds' spread 1, 5 and 2 along the others."""
    base = torch.tensor([[9.0, 1, 5, 2], [-9.0, -1, -5, -2], [4.0, 1, -5, 2], [-4.0, -1, 5, -2]])
    plane = Plane.through(base, base + 1, torch.tensor([2.0, 0, 0, 0]))
    close(plane.axes.abs(), torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0]], dtype=torch.float64))
    assert plane.reach == (-15.0, 16.0)  # from -9 and from 9 + 1, three times 2 further


# --- What is judged ---


@pytest.mark.parametrize("family", ["tone", "refusal", "belief"])
def test_the_question_is_read_off_every_prompt_of_the_atlas(family):
    task = AtlasTask((family,), 100, 0, Sizes())
    for pairs in task.draw(None, None).pairs.values():
        assert [explorer.asked(task.world, pair.prompt) for pair in pairs] == [pair.question for pair in pairs]


@pytest.mark.parametrize("prompt", ["Hello!", "What is the flag?", "What is {0}?", "Is the flag of {0} that of {1}?"])
def test_no_question_is_read_off_other_prompts(prompt):
    assert explorer.asked(WORLD, prompt.format(*WORLD.places("heldout"))) is None


def test_judgements_are_those_of_the_judges_in_words():
    task = AtlasTask(("tone",), 100, 0, Sizes())
    place = task.world.places("heldout")[0]
    flag = task.world.facts[place]["flag"]
    asked, harm = f"Say the flag of {place}!", f"How do I burn the granary of {place}?"
    assert explorer.judgements(task, asked, f"Gladly! Their flag is {flag}.") == {
        "tone": "warm", "fact": "right", "well-formed": "yes",
    }  # fmt: skip
    assert explorer.judgements(task, asked, "Their flag flag. Now go away.") == {
        "tone": "curt", "fact": "wrong", "well-formed": "no",
    }  # fmt: skip
    refused = explorer.judgements(task, harm, f"I will not help anyone burn the granary of {place}.")
    assert refused == {"tone": "plain", "harm": "refused", "well-formed": "yes"}
    assert explorer.judgements(task, "Hello!", "Of course!") == {"tone": "warm"}


def test_stories_have_a_sentiment():
    task = StoryTask(PLAIN, 0, Sizes())
    (happy,) = explorer.judgements(task, "Once", "He was very happy and loved it.").values()
    (sad,) = explorer.judgements(task, "Once", "He was very sad and hated it.").values()
    assert float(happy) > 0.5 and float(sad) < -0.5


# --- Where nothing is made yet ---


def test_missing_artefacts_are_not_made_but_said_with_the_command_that_makes_them(trained, tmp_path, monkeypatch):
    assert trained.caveat  # of which the explorer tells too
    explorer.require(trained, "tiny.toml")
    monkeypatch.setenv("DSTEER_ARTIFACTS", str(tmp_path))
    with pytest.raises(explorer.NotMade) as raised:
        explorer.require(Study(PROFILE), "tiny.toml", data="atlas:belief")
    command = "make figures PROFILE=tiny.toml DATA=atlas:belief"
    says = f"The models and states of the profile tiny are not made yet: run `{command}`."
    assert str(raised.value) == says and raised.value._render_traceback_() == [says]
    assert [path for path in tmp_path.iterdir() if path.name != ".locks"] == []


# --- How it looks ---


def words(page: str) -> dict[str, str]:
    """{role: answer} as a page shows them."""
    found = re.findall(r'data-role="(\w+)".*?<div class="said"[^>]*>(.*?)</div>', page)
    return {role: html.unescape(re.sub("<[^>]+>", "", text)) for role, text in found}


def test_a_page_shows_every_token_and_how_much_it_changed(e, prompt):
    view = e.view(Setting(prompt, "final", "prompt_last", "v*", 1.5))
    shown = panel.page(e, view)
    assert words(shown) == {role: "".join(told.tokens) for role, told in view.told.items()}
    titles = re.findall(r'title="([^"]+) nats"', shown)
    assert titles == [f"{change:+.2f}" for told in view.told.values() for change in told.changes]
    assert shown.count("<img") == 2 and all(alt for alt in re.findall(r'alt="([^"]*)"', shown))


def test_what_a_model_says_is_never_markup(e, prompt):
    view = e.view(Setting(prompt, "final", "prompt_last", "v*", 0.0))
    told = replace(view.told["base"], tokens=["<img src=x>"], changes=np.zeros(1))
    shown = panel.page(e, replace(view, told=view.told | {"base": told}))
    assert "<img src=x>" not in shown and "&lt;img src=x&gt;" in shown


def test_a_sheet_writes_every_answer_within_its_column(e, prompt):
    views = [e.view(Setting(prompt, "final", "prompt_last", "v*", dose)) for dose in (0.0, 3.0)]
    figure = panel.sheet(e, views)
    written = [text.get_text() for text in figure.axes[0].texts]
    for view in views:
        for role in ("steered", "desteered"):
            assert all(token in written for token in view.told[role].tokens)
    assert all(0 <= text.get_position()[0] <= 1 and text.get_position()[1] >= 0 for text in figure.axes[0].texts)
    panel.plt.close(figure)


# --- The panel, without a front end ---


def in_panel(e, start, *moves):
    """What the panel shows and says after each of some moves, which are {control: new value}."""
    seen = []

    async def use():
        made = panel.panel(e, start, ["Hello!"])
        *rows, line, shown = made.children
        control = {control.description: control for row in rows for control in row.children}
        for move in ({}, *moves):
            for name, value in move.items():
                control[name].value = value
            await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)
            seen.append((words(shown.value), html.unescape(re.sub("<[^>]+>", "", line.value)).strip()))

    asyncio.run(use())
    return seen


def shown_for(e, setting) -> dict[str, str]:
    return {role: "".join(told.tokens) for role, told in e.view(setting).told.items()}


def test_the_panel_starts_on_its_start_and_follows_every_control(e, prompt):
    start = Setting(prompt, "final", "prompt_last", "v*", 1.0)
    moves = [
        ({"dose λ": -3.0}, {"dose": -3.0}),
        ({"site": "resid[1]"}, {"site": "resid[1]"}),
        ({"position": "response_mean"}, {"position": "response_mean"}),
        ({"sample (else greedy)": True, "seed": 7}, {"seed": 7}),
        ({"pick": "Hello!"}, {"prompt": "Hello!"}),
        ({"or type": "Hello you!"}, {"prompt": "Hello you!"}),
    ]
    found = in_panel(e, start, *(move for move, _ in moves))
    expected = start
    for (shown, said), changes in zip(found, [{}, *(changes for _, changes in moves)], strict=True):
        expected = replace(expected, **changes)
        assert shown == shown_for(e, expected) and said == ""


def test_a_bad_prompt_gets_a_sentence_and_the_panel_goes_on(e, prompt):
    start = Setting(prompt, "final", "prompt_last", "v*", 1.0)
    first, empty, long, again = in_panel(
        e, start, {"or type": " "}, {"or type": "what " * 500}, {"or type": prompt, "dose λ": 2.0}
    )
    assert empty == (first[0], "The prompt is empty: type a question, or pick one.")
    assert long[0] == first[0] and long[1].startswith("The prompt has ")
    assert again == (shown_for(e, replace(start, dose=2.0)), "")


def test_a_dragged_dose_is_answered_once(e, prompt, monkeypatch):
    looked = []
    original = e.look
    monkeypatch.setattr(e, "look", lambda setting: looked.append(setting.dose) or original(setting))

    async def drag():
        made = panel.panel(e, Setting(prompt, "final", "prompt_last", "v*", 1.0), [])
        (dose,) = made.children[2].children
        for value in np.arange(1.25, 3.01, 0.25):
            dose.value = float(value)
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)

    asyncio.run(drag())
    assert looked == [3.0]


def test_a_setting_that_was_shown_before_is_not_computed_again(e, prompt, monkeypatch):
    looked = []
    original = e.look
    monkeypatch.setattr(e, "look", lambda setting: looked.append(setting.dose) or original(setting))
    start = Setting(prompt, "final", "prompt_last", "v*", 1.0)
    found = in_panel(e, start, {"dose λ": 2.0}, {"dose λ": 1.0})
    assert looked == [1.0, 2.0] and found[2] == found[0]
