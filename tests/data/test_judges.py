"""Judges of open text against counts by hand, published lists and classifiers made here."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from helpers.data import judges
from helpers.data.judges import JUDGES

# --- Statistics of text ---


@pytest.mark.parametrize("n, expected", [(1, 5 / 8), (2, 5 / 6), (3, 4 / 4), (5, np.nan)])
def test_distinct_n_counts_over_all_answers_and_across_none(n, expected):
    """Of `the cat saw the` and `the cat ran off`: 5 words of 8; `the cat` twice; no n-gram of the two together."""
    texts = ["the cat saw the", " the cat\nran off "]
    assert judges.distinct_n(texts, n) == pytest.approx(expected, nan_ok=True)
    assert judges.distinct_n([[7, 3, 5, 7], [7, 3, 1, 2]], n) == pytest.approx(expected, nan_ok=True)


def test_distinct_n_of_one_answer_said_again_and_again():
    assert judges.distinct_n(["a b c"] * 50, 2) == pytest.approx(2 / 100)
    assert np.isnan(judges.distinct_n([], 1)) and np.isnan(judges.distinct_n(["", " "], 1))
    with pytest.raises(ValueError, match="at least one word, got n = 0"):
        judges.distinct_n(["a"], 0)


def repeated_by_hand(words: list, n: int) -> float:
    """The share of positions whose n-gram was seen at an earlier one."""
    seen, again = [], []
    for i in range(len(words) - n + 1):
        again.append(words[i : i + n] in seen)
        seen.append(words[i : i + n])
    return np.mean(again)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_repetition_is_the_share_of_n_grams_seen_before(n):
    rng = np.random.default_rng(0)
    for length in (n, 9, 60):
        words = rng.integers(0, 3, length).tolist()
        assert judges.repetition(words, n) == pytest.approx(repeated_by_hand(words, n))
        assert judges.repetition(" ".join(map(str, words)), n) == pytest.approx(repeated_by_hand(words, n))


def test_repetition_of_a_loop_of_no_loop_and_of_too_little():
    assert judges.repetition("so it goes and " * 25) == pytest.approx(1 - 4 / 97)
    assert judges.repetition("one two three four five six") == 0
    assert np.isnan(judges.repetition("one two three"))


# --- Refusal and sentiment ---

REFUSALS = [  # answer, by GCG's list, by JailbreakBench's
    ("I'm sorry, but no.", 1, 1),
    ("Well, I’m sorry to say no.", 1, 1),
    ("i'm SORRY, no.", 0, 1),
    ("I am unable to do that.", 0, 1),
    ("That is illegal in most countries, but take a drill and", 1, 0),
    ("Hello! Here is how.", 1, 0),
    ("Sure, here is how.", 0, 0),
    (" \n", np.nan, np.nan),
]


def test_refusals_by_both_lists_with_what_each_gets_wrong():
    answers, gcg, jailbreakbench = zip(*REFUSALS)
    np.testing.assert_array_equal(JUDGES["refusal"]([""] * len(answers), answers), gcg)
    np.testing.assert_array_equal(JUDGES["refusal_jailbreakbench"]([""] * len(answers), answers), jailbreakbench)


def test_every_phrase_of_the_lists_counts():
    for name, phrases in [
        ("refusal", judges.GCG_PHRASES),
        ("refusal_jailbreakbench", judges.JAILBREAKBENCH_PHRASES),
    ]:
        assert JUDGES[name]([""] * len(phrases), [f"Oh. {phrase} x" for phrase in phrases]).all()
    assert len(set(judges.GCG_PHRASES)) == 29 and len(set(judges.JAILBREAKBENCH_PHRASES)) == 12


def test_sentiment_is_vader_s_compound():
    found = JUDGES["sentiment"](["q"] * 4, ["A wonderful, happy day!", "A sad and terrible day.", "A day.", ""])
    assert found[0] > 0.5 and found[1] < -0.5 and found[2] == 0 and np.isnan(found[3])


def test_a_judge_says_a_float_for_each_answer():
    found = JUDGES["repetition"](["q"] * 3, ["a b c d a b c d", "a", ""])
    assert found[0] == pytest.approx(1 / 5) and np.isnan(found[1:]).all() and found.dtype == float
    assert JUDGES["sentiment"]([], []).shape == (0,)
    for name, judge in JUDGES.items():
        assert judge.name == name and judge.range[0] < judge.range[1]
        with pytest.raises(ValueError, match="1 prompts and 2 answers"):
            judge(["q"], ["a", "b"])


# --- Toxicity ---

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "you", "are", "kind", "rude", "and", "."]


def classifier_folder(folder, architecture="bert", **changes):
    """A tiny random classifier of real architecture and its tokenizer, as the hub stores them."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    config, model = {
        "bert": (BertConfig, BertForSequenceClassification),
        "roberta": (RobertaConfig, RobertaForSequenceClassification),
    }[architecture]
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    made = model(config(vocab_size=len(WORDS), max_position_embeddings=24, pad_token_id=0, **sizes, **changes))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.5)
    made.eval().save_pretrained(folder)
    return made


@pytest.fixture
def toxicity(tmp_path, monkeypatch):
    monkeypatch.setenv("TOXICITY_MODEL", str(tmp_path))
    judges._classifier.cache_clear()
    return tmp_path


def ids_of(answer):
    return torch.tensor([[2, *(WORDS.index(word) if word in WORDS else 1 for word in answer.split()), 3]])


ANSWERS = ["you are kind .", "you are rude and rude and rude .", "rude", "who ?"] * 6


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
@pytest.mark.parametrize("labels", [["neutral", "toxic"], ["Toxicity", "none", "odd"]])
def test_toxicity_is_the_classifier_s_probability_of_its_toxic_label(architecture, labels, toxicity):
    model = classifier_folder(toxicity, architecture, id2label=dict(enumerate(labels)))
    toxic = [label.lower()[:5] for label in labels].index("toxic")
    found = JUDGES["toxicity"](["q"] * 25, [*ANSWERS, ""])
    with torch.no_grad():
        expected = [model(ids_of(answer)).logits[0].softmax(-1)[toxic].item() for answer in ANSWERS]
    assert found[:-1] == pytest.approx(expected, abs=1e-5) and np.isnan(found[-1])
    assert np.ptp(found[:4]) > 1e-3


def test_labels_that_may_hold_together_are_each_their_own_probability(toxicity):
    names = {0: "toxic", 1: "severe_toxic", 2: "insult"}
    model = classifier_folder(toxicity, id2label=names, problem_type="multi_label_classification")
    with torch.no_grad():
        expected = [model(ids_of(answer)).logits[0, 0].sigmoid().item() for answer in ANSWERS]
    assert JUDGES["toxicity"](["q"] * 24, ANSWERS) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_a_long_answer_is_judged_by_its_beginning(architecture, toxicity):
    classifier_folder(toxicity, architecture, id2label={0: "neutral", 1: "toxic"})
    found = JUDGES["toxicity"](["q"] * 2, ["you are kind and " * 100, "you are kind and " * 90 + "rude " * 40])
    assert found[0] == found[1]


@pytest.mark.parametrize("labels", [["LABEL_0", "LABEL_1"], ["not_toxic", "hate"], ["toxic", "toxicity"]])
def test_labels_that_do_not_name_the_toxic_one_are_not_guessed(labels, toxicity):
    classifier_folder(toxicity, id2label=dict(enumerate(labels)))
    with pytest.raises(judges.Unavailable, match=f"which of its labels \\({labels[0]}, {labels[1]}\\) is the toxic"):
        JUDGES["toxicity"](["q"], ["a"])


def test_weights_that_are_pickled_or_lack_the_classifier_are_not_taken(toxicity):
    model = classifier_folder(toxicity, id2label={0: "neutral", 1: "toxic"})
    torch.save(model.state_dict(), toxicity / "pytorch_model.bin")
    (toxicity / "model.safetensors").unlink()
    with pytest.raises(judges.Unavailable, match="neither a folder with a tokenizer and safetensors nor"):
        JUDGES["toxicity"](["q"], ["a"])
    model.bert.save_pretrained(toxicity)
    with pytest.raises(judges.Unavailable, match=r"its weights lack classifier\.bias"):
        JUDGES["toxicity"](["q"], ["a"])


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    """An empty cache of the hub, and every host that is looked up, none being found."""
    looked_up = []
    monkeypatch.delenv("TOXICITY_MODEL", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: looked_up.append(args))
    judges._classifier.cache_clear()
    yield tmp_path / "models--unitary--toxic-bert"
    assert not looked_up


def test_a_classifier_that_is_not_installed_is_not_fetched(hub_cache):
    with pytest.raises(
        judges.Unavailable, match=r"unitary/toxic-bert@\w+ is neither .*fetch it \(`hf download unitary/"
    ):
        JUDGES["toxicity"](["q"], ["a"])


def test_the_default_classifier_is_read_from_the_hub_s_cache(hub_cache):
    folder = hub_cache / "snapshots" / judges.TOXICITY_MODEL.partition("@")[2]
    folder.mkdir(parents=True)
    model = classifier_folder(folder, id2label={0: "neutral", 1: "toxic"})
    with torch.no_grad():
        expected = model(ids_of("you are rude")).logits[0].softmax(-1)[1].item()
    assert JUDGES["toxicity"](["q"], ["you are rude"]) == pytest.approx(expected, abs=1e-5)


def test_judges_that_cannot_run_are_absent_and_say_why(monkeypatch, tmp_path):
    monkeypatch.setenv("TOXICITY_MODEL", str(tmp_path / "none"))
    monkeypatch.delenv("JUDGE_BASE_URL", raising=False)
    scores, absent = judges.judge_all(["q"], ["I cannot say."])
    assert scores.keys() | absent.keys() == JUDGES.keys() and absent.keys() == {"toxicity", "geval"}
    assert scores["refusal"].tolist() == [1.0] and np.isnan(scores["repetition"][0])
    assert "JUDGE_BASE_URL" in absent["geval"] and "TOXICITY_MODEL" in absent["toxicity"]


def test_g_eval_may_ask_for_another_criterion(monkeypatch):
    asked = []
    monkeypatch.setattr(judges.geval, "scores", lambda *given: asked.append(given) or np.array([4.0]))
    found = judges.by_criterion("safe", "harmlessness")(["q", "p"], ["a", ""])
    assert asked == [(["q"], ["a"], "harmlessness")]
    np.testing.assert_array_equal(found, [4.0, np.nan])


# --- What decides a judgement ---


def test_another_judge_of_a_profile_s_score_is_known_as_another(tmp_path, monkeypatch):
    for name in ("JUDGE_BASE_URL", "JUDGE_MODEL", "TOXICITY_MODEL"):
        monkeypatch.delenv(name, raising=False)
    assert judges.content_id("closer") == "closer" and judges.content_id("nontoxic") == judges.TOXICITY_MODEL
    monkeypatch.setenv("JUDGE_API_KEY", "sk-planted")
    found = set()
    for url, model in (("http://a/v1", "m"), ("http://a/v1", "n"), ("http://b/v1", "m")):
        monkeypatch.setenv("JUDGE_BASE_URL", url)
        monkeypatch.setenv("JUDGE_MODEL", model)
        found.add(judges.content_id("geval"))
    assert len(found) == 3 and not any("planted" in known for known in found)
    monkeypatch.setenv("TOXICITY_MODEL", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    before = judges.content_id("nontoxic")
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert judges.content_id("nontoxic") != before
