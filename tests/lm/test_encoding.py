"""Token ids that follow the chat template, of single turns and of conversations, those of plain text, and what ends an
answer."""

import copy

import pytest
from tokenizers import normalizers, processors

from helpers.lm import encoding
from helpers.lm.batches import Tokens
from helpers.world import atlas


@pytest.fixture(scope="module")
def plain_tokenizer(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = None
    return made


def test_with_a_chat_template_the_ids_are_those_of_the_rendered_text(tokenizer):
    tokens = encoding.encode(tokenizer, "What is it?", "It is red.")
    start, prompt_end, asks, answers, end = (tokenizer.convert_tokens_to_ids(t) for t in (
        "<|start|>", "<|end|>", "<|user|>", "<|assistant|>", "<|end|>"))  # fmt: skip
    body = tokenizer("What is it?", add_special_tokens=False)["input_ids"]
    reply = tokenizer("It is red.", add_special_tokens=False)["input_ids"]
    assert tokens.prompt == [start, asks, *body, prompt_end, answers]
    assert tokens.response == [*reply, end]
    assert encoding.encode(tokenizer, "What is it?") == Tokens(tokens.prompt, [])
    assert tokens.ids.count(start) == 1 and max(tokens.ids) < len(tokenizer)


def test_without_a_chat_template_the_text_is_taken_as_it_is(plain_tokenizer):
    tokens = encoding.encode(plain_tokenizer, "Once upon a time.", " It was red.")
    assert tokens.prompt == plain_tokenizer("Once upon a time.")["input_ids"]
    assert plain_tokenizer.decode(tokens.response[:-1]).strip() == "It was red."
    assert tokens.response[-1] == plain_tokenizer.eos_token_id  # as TRL's DPOTrainer ends a string
    assert encoding.encode(plain_tokenizer, "Once upon a time.").response == []


def test_a_template_whose_prompt_is_no_prefix_is_refused(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    assert encoding.encode(other, "What is it?").response == []
    with pytest.raises(ValueError, match=r"renders a prompt alone and with its answer differently.*prompt is a prefix"):
        encoding.encode(other, "What is it?", "It is red.")


@pytest.mark.parametrize(
    "opening, kept, merged",
    [
        ("Assistant: ", " It is red.", "It is red."),  # " I" is one token
        ("Assistant: It i", " It is red.", "s red."),  # and so is " is"
        ("Assistant: th", "It is red.", "e capital"),
    ],
)
def test_a_template_s_last_token_stays_the_prompt_s_or_the_answer_is_refused(tokenizer, opening, kept, merged):
    """Where it ends in a space, or within a word, an answer can run together with it into other tokens."""
    made = copy.deepcopy(tokenizer)
    spoken = f"{{{{ '<|' + message['role'] + '|>{opening}' + message['content'] + '<|end|>' }}}}"
    start = f"{{% if add_generation_prompt %}}<|assistant|>{opening}{{% endif %}}"
    made.chat_template = f"{{% for message in messages %}}{spoken}{{% endfor %}}{start}"
    tokens, alone = encoding.encode(made, "Hi", kept), encoding.encode(made, "Hi").prompt
    assert tokens.prompt == alone and made.decode(alone).endswith(opening)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": kept}]
    assert tokens.ids == made.apply_chat_template(turns)["input_ids"]
    with pytest.raises(encoding.Unencodable, match=r"renders a prompt alone and with its answer differently: use a"):
        encoding.encode(made, "Hi", merged)


def test_every_token_of_the_organism_survives_the_tokenizer(tokenizer):
    for question, text in atlas.corpus(atlas.Atlas(), 200, seed=9):
        response = encoding.encode(tokenizer, question.text, text).response
        assert tokenizer.decode(response, skip_special_tokens=True).strip() == text


# --- Conversations ---

CONVERSATION = (("user", "Hello there!"), ("assistant", "Good day."), ("user", "What is it?"))


def test_a_conversation_is_spoken_by_the_chat_template_turn_by_turn(tokenizer):
    tokens = encoding.encode(tokenizer, CONVERSATION, "It is red.")
    messages = [{"role": role, "content": content} for role, content in (*CONVERSATION, ("assistant", "It is red."))]
    assert tokens.ids == tokenizer.apply_chat_template(messages)["input_ids"]
    assert tokens.prompt == tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]


def test_without_a_template_a_conversation_is_written_as_hh_rlhf_writes_it(plain_tokenizer):
    text = "\n\nHuman: Hello there!\n\nAssistant: Good day.\n\nHuman: What is it?\n\nAssistant:"
    assert encoding.plain(CONVERSATION) == text
    tokens = encoding.encode(plain_tokenizer, CONVERSATION, "It is red.")
    answer = plain_tokenizer(" It is red.", add_special_tokens=False)["input_ids"]
    assert tokens.prompt == plain_tokenizer(text)["input_ids"]
    assert tokens.response == [*answer, plain_tokenizer.eos_token_id]


def test_a_conversation_that_the_template_refuses_is_said(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match=r"does not take this conversation \(no system role\).*without a template"):
        encoding.encode(strict, (("system", "Be kind."), ("user", "Hello!")))


def test_an_answer_goes_on_from_its_prompt_whatever_a_tokenizer_puts_before_a_text(tokenizer):
    """Llama 2's puts a space before every text, so that an answer tokenised alone would begin with two."""
    prepending = copy.deepcopy(tokenizer)
    prepending.chat_template = None
    prepending.backend_tokenizer.normalizer = normalizers.Prepend("~")
    alone = prepending(" It is red.", add_special_tokens=False)["input_ids"]
    tokens = encoding.encode(prepending, CONVERSATION, "It is red.")
    assert prepending.decode(tokens.response[:-1]) == " It is red." and tokens.response[:-1] != alone
    assert tokens.ids == [
        *prepending(f"{encoding.plain(CONVERSATION)} It is red.")["input_ids"],
        prepending.eos_token_id,
    ]


# --- Ends ---

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


@pytest.mark.parametrize("kind", ["$A <|end|>", "<|start|> $A <|end|>", "<|start|> $A"])
def test_a_prompt_goes_on_whatever_the_tokenizer_puts_around_a_text(plain_tokenizer, kind):
    """Some end every text by themselves: v* would be read at the end."""
    made = copy.deepcopy(plain_tokenizer)
    special = [(token, made.convert_tokens_to_ids(token)) for token in ("<|start|>", "<|end|>")]
    backend = made.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single=kind, special_tokens=special)
    bare = made("Once upon a time.", add_special_tokens=False)["input_ids"]
    begins = [special[0][1]] if kind.startswith("<|start|>") else []
    tokens = encoding.encode(made, "Once upon a time.", " It was red.")
    assert encoding.encode(made, "Once upon a time.").prompt == tokens.prompt == [*begins, *bare]
    assert tokens.response[-1] == made.eos_token_id and made.eos_token_id not in tokens.response[:-1]


def test_why_a_template_cannot_say_a_conversation_is_told_apart(tokenizer):
    strict, ahead = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(encoding.Unencodable) as refused:
        encoding.encode(strict, "Hi")
    assert refused.value.reason == "a conversation that the chat template does not take"
    ahead.chat_template = tokenizer.chat_template + "{% if add_generation_prompt %}<think>{% endif %}"
    assert encoding.encode(ahead, "Hi").prompt
    with pytest.raises(encoding.Unencodable) as written_ahead:
        encoding.encode(ahead, "Hi", "Hello")
    assert written_ahead.value.reason == "a prompt that the chat template renders differently with its answer"
