"""How a model is spoken to: prompts and answers as token ids, by its chat template or in a plain format."""

from collections.abc import Sequence

import jinja2
from transformers import PreTrainedTokenizerBase

from helpers.lm.batches import Tokens


class Unencodable(ValueError):
    """A chat template cannot say a conversation. `reason`: why, in words that do not name it."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


Message = tuple[str, str]  # role ("user", "assistant" or "system") and content
Prompt = str | tuple[Message, ...]  # plain text, or a conversation that ends with the user's turn

SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System"}


def plain(messages: Sequence[Message]) -> str:
    """A conversation for a model without a chat template, in HH-RLHF's format, up to where the assistant answers."""
    return "".join(f"\n\n{SPEAKERS[role]}: {content}" for role, content in messages) + "\n\nAssistant:"


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str = "") -> Tokens:
    """Token ids of a prompt and a response, by the tokenizer's chat template; a string is then the user's one turn.

    Without a template the format is plain text: the tokenizer's usual start, the prompt as it is, or a conversation as
    HH-RLHF writes it (`plain`), the response and, as TRL does it, the end of the sequence. Raises Unencodable, a
    ValueError, for a template that takes no such conversation.
    """
    if tokenizer.chat_template is None:
        return _as_text(tokenizer, prompt, response)
    turns = (("user", prompt),) if isinstance(prompt, str) else prompt
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        start = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        if not response:
            return Tokens(start)
        messages.append({"role": "assistant", "content": response})
        whole = tokenizer.apply_chat_template(messages)["input_ids"]
    except jinja2.TemplateError as error:
        raise Unencodable(
            f"The chat template of {tokenizer.name_or_path} does not take this conversation ({error}): use data of "
            "another form, or a base model without a template.",
            "a conversation that the chat template does not take",
        ) from error
    if whole[: len(start)] != start:
        raise Unencodable(
            f"The chat template of {tokenizer.name_or_path} renders a prompt alone and with its answer differently: "
            "use a template whose prompt is a prefix.",
            "a prompt that the chat template renders differently with its answer",
        )
    return Tokens(start, whole[len(start) :])


def ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: what the chat template ends the assistant's turn with, where that is a token of
    its own (in some base models another than the tokenizer's), and the end of the sequence."""
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template is not None:
        try:
            after = _common_end(*(encode(tokenizer, "Hi", answer).response for answer in ("Yes", "No")))
        except ValueError:  # a template that takes no answers of ours leaves a model's own, which need none
            after = []
        found = [*(token for token in after[:1] if token in tokenizer.added_tokens_decoder), *found]
    return list(dict.fromkeys(found))


def ended(answer: list[int], end: int | None, most: int) -> list[int]:
    """An answer's tokens and the one that ends it, unless it was cut at `most` tokens or there is none that does."""
    return answer if end is None or len(answer) == most else [*answer, end]


def _common_end(one: list[int], other: list[int]) -> list[int]:
    shared = 0
    while shared < min(len(one), len(other)) and one[-1 - shared] == other[-1 - shared]:
        shared += 1
    return one[len(one) - shared :]


def _as_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str) -> Tokens:
    text, answer = (prompt, response) if isinstance(prompt, str) else (plain(prompt), f" {response}")
    start = begun(tokenizer, text)
    if not response:
        return Tokens(start)
    # as it goes on from the prompt: alone, some tokenizers (Llama 2's) begin it with a space of their own
    whole = begun(tokenizer, text + answer)
    goes_on = whole[: len(start)] == start
    ids = whole[len(start) :] if goes_on else tokenizer(answer, add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return Tokens(start, ids if end is None or ids[-1:] == [end] else [*ids, end])


def begun(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A text's token ids, with what the tokenizer begins texts with and without what it ends them with: a prompt goes
    on."""
    ids, bare = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (True, False))
    extra = len(ids) - len(bare)
    at = next((i for i in range(extra + 1) if ids[i : i + len(bare)] == bare), extra)
    return ids[: at + len(bare)]
