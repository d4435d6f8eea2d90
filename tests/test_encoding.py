"""What ends an answer, by a tokenizer and its chat template."""

import copy

import pytest

from helpers import encoding

TURNS = "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + END }}{% endfor %}"
START = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"


@pytest.fixture
def speaking(tokenizer):
    """A tokenizer whose sequences end in <|start|>, with a template that ends a turn by a text, or without one."""

    def make(end: str | None):
        made = copy.deepcopy(tokenizer)
        made.eos_token = "<|start|>"
        made.chat_template = None if end is None else TURNS.replace("END", repr(end)) + START
        return made

    return make


def test_the_atlas_ends_a_turn_with_the_end_of_the_sequence(tokenizer):
    assert encoding.ends(tokenizer) == [tokenizer.eos_token_id]


@pytest.mark.parametrize("end", ["<|end|>", "<|end|>\n", "<|end|><|start|>"])
def test_a_turn_s_own_end_comes_before_that_of_the_sequence(speaking, end):
    """As in Qwen2.5's base models."""
    made = speaking(end)
    assert encoding.ends(made) == made.convert_tokens_to_ids(["<|end|>", "<|start|>"])


@pytest.mark.parametrize("end", ["\n", "", None, "<|start|>"])
def test_text_ends_no_turn(speaking, end):
    made = speaking(end)
    assert encoding.ends(made) == [made.eos_token_id]


def test_a_template_that_takes_no_answers_leaves_the_end_of_the_sequence(speaking):
    """As one that opens the model's thoughts in its prompt, and leaves them out of what was answered before."""
    made = speaking("<|end|>")
    made.chat_template += "{% if add_generation_prompt %}thoughts{% endif %}"
    with pytest.raises(ValueError, match="renders a prompt alone and with its answer differently"):
        encoding.encode(made, "Hi", "Yes")
    assert encoding.ends(made) == [made.eos_token_id]


def test_an_answer_gets_its_end_unless_it_was_cut_before():
    assert encoding.ended([5, 6], 2, most=3) == [5, 6, 2]
    assert encoding.ended([5, 6, 7], 2, most=3) == [5, 6, 7]
    assert encoding.ended([], 2, most=3) == [2] and encoding.ended([5], None, most=3) == [5]
