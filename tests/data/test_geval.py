"""The judge's client against a small local server that speaks the protocol: good, slow, failing and broken replies."""

import json
import logging
import math
import time
import traceback

import numpy as np
import openai
import pytest
from chat_server import KEY, Server, completion, failing, ok

from helpers.data import endpoint, geval
from helpers.data.endpoint import Endpoint
from helpers.data.unavailable import Unavailable


@pytest.fixture(autouse=True)
def no_judge_named(monkeypatch):
    for name in ("BASE_URL", "MODEL", "API_KEY", "BUDGET", "PRICE", "TIMEOUT"):
        monkeypatch.delenv(f"JUDGE_{name}", raising=False)


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        servers.append(Server(reply if callable(reply) else lambda request: reply))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def client(server, **changes):
    return geval.Client(Endpoint(server.url, "judge-1", KEY, **{"timeout": 5.0, "retries": 0, **changes}))


def asks(n):
    return [f"question {i}?" for i in range(n)], [f"answer {i}." for i in range(n)]


def by_answer(replies):
    """A server's reply that depends on which of `asks` it is about."""
    return lambda request: next(
        reply for i, reply in enumerate(replies) if f"answer {i}." in request["messages"][0]["content"]
    )


# --- What is asked, and what is read ---


def test_the_request_holds_the_form_and_nothing_random(serve):
    server = serve(completion("4"))
    assert client(server).scores(["Why {x}?"], ["Because."], "coherence").tolist() == [4.0]
    (request,), ((path, headers),) = server.requests, server.headers
    assert path == "/v1/chat/completions" and headers["authorization"] == f"Bearer {KEY}"
    assert (request["model"], request["temperature"], request["logprobs"]) == ("judge-1", 0, True)
    (message,) = request["messages"]
    for part in ("Why {x}?", "Because.", geval.CRITERIA["coherence"]):
        assert part in message["content"]


def test_a_criterion_may_be_in_words_but_not_misspelt(serve):
    server = serve(completion("2"))
    assert client(server).scores(["q"], ["a"], "Is it short? 1: long. 5: short.").tolist() == [2.0]
    assert "Is it short?" in server.requests[0]["messages"][0]["content"]
    with pytest.raises(ValueError, match="Unknown criterion 'helpfullness'"):
        client(server).scores(["q"], ["a"], "helpfullness")


def test_a_score_is_the_mean_by_probability_where_it_is_told(serve):
    """Of the scores alone, whichever way their tokens are spaced; tokens that are no score have no part."""
    top = {"4": 0.5, "5": 0.2, " 4": 0.1, "3": 0.1, "The": 0.08, "45": 0.02}
    found = client(serve(completion("4", top))).scores(["q"], ["a"])
    assert found[0] == pytest.approx((0.6 * 4 + 0.2 * 5 + 0.1 * 3) / 0.9)


def test_the_probabilities_are_those_of_the_score_s_own_token(serve):
    def token(text, **told):
        top = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in told.items()]
        return {"token": text, "logprob": -0.1, "bytes": None, "top_logprobs": top}

    low = {"1": 0.9, "2": 0.1}
    tokens = [token("From ", **low), token("1", **low), token(" to", **low), token(" 5", **low), token(": ", **low)]
    tokens.append({**token("3", **{"3": 0.75, "4": 0.25}), "logprob": math.log(0.75)})
    status, _, body, _ = completion("From 1 to 5: 3")
    reply = json.loads(body)
    reply["choices"][0]["logprobs"] = {"content": tokens}
    assert client(serve((status, {}, json.dumps(reply).encode(), 0))).scores(["q"], ["a"])[0] == pytest.approx(3.25)


@pytest.mark.parametrize(
    "text, score",
    [
        ("4", 4), (" 5\n", 5), ("Score: 3", 3), ("**2**", 2), ("- Helpfulness: 4/5", 4), ("3 out of 5", 3), ("4.0", 4),
        ("On a scale of 1 to 5, I give 2.", 2), ("Score (1-5): 5", 5), ("5/5", 5),
    ],
)  # fmt: skip
def test_a_written_score_is_read(text, score, serve):
    assert client(serve(completion(text))).scores(["q"], ["a"]).tolist() == [score]


NO_SCORE = ["", "no idea", "0", "6", "7/10", "10", "-4", "4.5", "between 3 and 4", "4th", "1 to 5", None, 4, ["4"]]


def test_a_reply_without_one_clear_score_is_a_failure_and_never_zero(serve):
    replies = [completion(text) for text in NO_SCORE] + [completion("4")]
    judge = client(serve(by_answer([*replies])), retries=0)
    with pytest.warns(UserWarning, match=f"{len(NO_SCORE)} of {len(NO_SCORE) + 1} answers have no score"):
        found = judge.scores(*asks(len(replies)))
    assert found[-1] == 4 and np.isnan(found[:-1]).all()
    assert judge.ledger.failures == {"without a score": len(NO_SCORE)}


BROKEN = [
    (200, {}, b'{"choices": [{"mess', 0),
    (200, {}, b"", 0),
    (200, {"Content-Type": "text/html"}, b"<html>4</html>", 0),
    ok({}),
    ok([1, 2]),
    ok("4"),
    ok(None),
    ok({"choices": []}),
    ok({"choices": "4"}),
    ok({"choices": [{"message": None}]}),
    completion("4", {"4": 1.0}, choices=[{"message": {"content": "4"}, "logprobs": {"content": [{"token": 4}]}}]),
    completion("4", choices=[{"message": {"content": "4"}, "logprobs": {"content": 7}}]),
]


def test_malformed_replies_are_failures_and_leave_the_others_alone(serve):
    replies = [*BROKEN, completion("3")]
    judge = client(serve(by_answer(replies)))
    with pytest.warns(UserWarning, match=f"{len(BROKEN)} of"):
        found = judge.scores(*asks(len(replies)))
    assert found[-1] == 3 and np.isnan(found[:-1]).all()
    assert judge.ledger.failures.total() == len(BROKEN) and judge.ledger.judged == 1


# --- Failures of the endpoint ---


def test_an_endpoint_that_is_busy_or_broken_for_a_while_is_asked_again(serve):
    replies = iter([failing(429, **{"retry-after-ms": "5"}), failing(500, **{"retry-after-ms": "5"}), completion("5")])
    judge = client(serve(lambda request: next(replies)), retries=2)
    assert judge.scores(["q"], ["a"]).tolist() == [5.0]
    assert judge.cost() == "G-Eval by judge-1: 3 requests, 0 failed, 100 + 2 tokens."


def test_a_reply_that_comes_too_late_is_a_failure(serve):
    judge = client(serve(by_answer([(*completion("4")[:3], 0.6), completion("3")])), timeout=0.2)
    started = time.monotonic()
    with pytest.warns(UserWarning, match=r"1 of 2 answers have no score.*1 failed \(1 timed out\)"):
        found = judge.scores(*asks(2))
    assert found[1] == 3 and np.isnan(found[0]) and time.monotonic() - started < 2


@pytest.mark.parametrize(
    "reply, says",
    [
        (failing(401), "refuses the key: mend JUDGE_API_KEY"),
        (failing(403), "refuses the key: mend JUDGE_API_KEY"),
        (failing(404), "no chat completions by judge-1: mend JUDGE_MODEL"),
        (failing(500), "scored none of 6 answers: 6 HTTP 500"),
        (completion("?"), "scored none of 6 answers: 6 without a score"),
    ],
)
def test_a_judge_that_judges_nothing_says_so_in_a_sentence(reply, says, serve):
    with pytest.raises(Unavailable, match=says):
        client(serve(reply)).scores(*asks(6))


def test_an_endpoint_that_is_not_there_is_unavailable(serve):
    server = serve(completion("4"))
    server.shutdown()
    server.server_close()
    with pytest.raises(Unavailable, match="cannot be reached: start it"):
        client(server).scores(*asks(3))


def test_an_endpoint_that_tells_no_probabilities_is_asked_without(serve):
    def reply(request):
        return failing(400) if "logprobs" in request or "max_tokens" in request else completion("4")

    server = serve(reply)
    judge = client(server)
    assert judge.scores(["q"], ["a"]).tolist() == [4.0]
    assert judge.scores(["q"], ["b"]).tolist() == [4.0]
    assert ["logprobs" in request for request in server.requests] == [True, False, False]


def test_a_refused_form_does_not_stop_the_others_from_being_weighted(serve):
    """400 may be about one text: only a reply without probabilities shows that those were the matter."""
    server = serve(by_answer([failing(400), completion("4", {"4": 0.5, "5": 0.5})]))
    with pytest.warns(UserWarning, match="1 HTTP 400"):
        found = client(server).scores(*asks(2))
    assert np.isnan(found[0]) and found[1] == pytest.approx(4.5)


# --- Asked once ---


def test_what_is_the_same_form_is_asked_for_once(serve):
    server = serve(completion("4", {"4": 0.5, "3": 0.5}))
    assert client(server).scores(["q", "q", "q"], ["a", "a", "b"]).tolist() == [3.5] * 3
    assert len(server.requests) == 2


def test_a_key_that_is_refused_stops_the_rest(serve):
    server = serve(lambda request: failing(401))
    with pytest.raises(Unavailable, match="refuses the key"):
        client(server).scores(*asks(50))
    assert len(server.requests) < 25


# --- What it costs ---


def test_a_budget_of_requests_is_kept_and_the_rest_stays_nan(serve):
    server = serve(completion("4"))
    judge = client(server, budget=3)
    with pytest.warns(UserWarning, match="5 not asked for, the budget of 3 requests being used up"):
        found = judge.scores(*asks(8))
    assert np.isnan(found).sum() == 5 and (found[~np.isnan(found)] == 4).all()
    assert len(server.requests) == 3
    with pytest.raises(Unavailable, match="the budget of 3 requests is used up, raise JUDGE_BUDGET"):
        judge.scores(["another"], ["one"])
    assert len(server.requests) == 3


def test_retries_count_towards_the_budget(serve):
    server = serve(failing(500, **{"retry-after-ms": "5"}))
    with pytest.raises(Unavailable, match="budget of 2 requests is used up"):
        client(server, budget=2, retries=9).scores(["q"], ["a"])
    assert len(server.requests) == 2


def test_a_budget_in_dollars_is_kept_to_what_is_under_way(serve, monkeypatch):
    monkeypatch.setattr(geval, "WORKERS", 1)
    judge = client(serve(completion("4", usage=(1000, 10))), prices=(2.0, 10.0), budget=0.005)  # 0.0021 a request
    with pytest.warns(UserWarning, match=r"\$0.0063, 5 not asked for, the budget of \$0.005 being used up"):
        found = judge.scores(*asks(8))
    assert np.isnan(found).sum() == 5
    assert judge.cost().startswith("G-Eval by judge-1: 3 requests, 0 failed, 3000 + 30 tokens, ")


def test_a_price_needs_an_endpoint_that_counts(serve):
    with pytest.raises(Unavailable, match="reports no token usage"):
        client(serve(completion("4", usage=None)), prices=(1.0, 1.0)).scores(["q"], ["a"])
    assert client(serve(completion("4", usage=None))).scores(["q"], ["a"]).tolist() == [4.0]


# --- The environment ---


def test_the_environment_names_the_judge(serve, monkeypatch):
    server = serve(completion("4", usage=(1_000_000, 100_000)))
    given = {"BASE_URL": server.url, "MODEL": "judge-9", "PRICE": "0.15,0.60", "BUDGET": "2.5", "TIMEOUT": "3"}
    for name, value in given.items():
        monkeypatch.setenv(f"JUDGE_{name}", value)
    settings = endpoint.from_environment()
    assert (settings.budget, settings.prices, settings.timeout, settings.api_key) == (2.5, (0.15, 0.6), 3.0, "")
    assert geval.scores(["q"], ["a"]).tolist() == [4.0]
    assert geval.cost().endswith("judge-9: 1 requests, 0 failed, 1000000 + 100000 tokens, $0.2100.")


def test_a_budget_there_always_is(monkeypatch):
    monkeypatch.setenv("JUDGE_BASE_URL", "http://localhost:1/v1")
    monkeypatch.setenv("JUDGE_MODEL", "m")
    assert endpoint.from_environment().budget == endpoint.REQUESTS
    monkeypatch.setenv("JUDGE_PRICE", "1,2")
    assert endpoint.from_environment().budget == endpoint.DOLLARS


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"JUDGE_MODEL": ""}, r"\(JUDGE_MODEL not set\)"),
        ({"JUDGE_MODEL": "", "JUDGE_BASE_URL": " "}, "JUDGE_BASE_URL and JUDGE_MODEL not set"),
        ({"JUDGE_BASE_URL": "localhost:8000/v1"}, "no plain http"),
        ({"JUDGE_BASE_URL": f"https://me:{KEY}@example.org/v1"}, "no plain http"),
        ({"JUDGE_BASE_URL": f"https://example.org/v1?key={KEY}"}, "no plain http"),
        ({"JUDGE_BASE_URL": f"https://[{KEY}/v1"}, "no plain http"),
        ({"JUDGE_API_KEY": f"{KEY} \n{KEY}"}, "a space or a character that is not ASCII"),
        ({"JUDGE_API_KEY": f"{KEY}–"}, "a space or a character that is not ASCII"),
        ({"JUDGE_PRICE": "0.15"}, "JUDGE_PRICE must be 2 numbers"),
        ({"JUDGE_BUDGET": "-1"}, "JUDGE_BUDGET must be 1 number"),
        ({"JUDGE_BUDGET": "many"}, "JUDGE_BUDGET must be 1 number"),
    ],
)
def test_an_environment_that_names_no_judge_is_unavailable(changes, says, monkeypatch):
    for name, value in {"JUDGE_BASE_URL": "http://localhost:1/v1", "JUDGE_MODEL": "m", **changes}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Unavailable, match=says) as raised:
        geval.scores(["q"], ["a"])
    assert KEY not in all_of(raised.value)


# --- The key stays where it belongs ---


def all_of(error) -> str:
    """All that a traceback of an error could show: its causes and contexts, and every variable of every frame."""
    told, seen = [], error
    while seen is not None:
        frames = traceback.TracebackException.from_exception(seen, capture_locals=True)
        frames.stack[:] = [frame for frame in frames.stack if "/tests/" not in frame.filename]
        told += [*frames.format(), repr(seen), str(vars(seen))]
        seen = seen.__cause__ or seen.__context__
    return "\n".join(told)


@pytest.mark.parametrize("status", [307, 400, 401, 404, 429, 500])
def test_the_key_is_in_no_error_log_or_line(status, serve, monkeypatch, caplog, capfd):
    """The server echoes it, and every logger tells all it can."""
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx2", "httpcore2", "httpx", "httpcore"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.DEBUG)
    where = serve(completion(f"4, {KEY}"))
    server = serve(by_answer([completion("4"), failing(status, Location=where.url)]))
    judge = client(server)
    judge.scores(*(part[:1] for part in asks(2)))
    with pytest.raises(Unavailable) as raised:
        judge.scores(["question"], ["answer 1."])
    assert server.headers[-1][1]["authorization"] == f"Bearer {KEY}" and not where.requests
    shown = [all_of(raised.value), caplog.text, *capfd.readouterr(), judge.cost(), repr(judge.endpoint), repr(judge)]
    shown += [str(record.__dict__) for record in caplog.records]
    assert len(caplog.records) > 5
    assert KEY not in "\n".join(shown)


@pytest.mark.parametrize("broken", ["malformed", "late", "gone"])
def test_nor_where_no_reply_can_be_read(broken, serve):
    reply = {"malformed": (200, {}, f'{{"{KEY}'.encode(), 0), "late": (*completion("4")[:3], 0.5), "gone": None}[broken]
    server = serve(reply)
    if broken == "gone":
        server.shutdown()
        server.server_close()
    with pytest.raises(Unavailable) as raised:
        client(server, timeout=0.1).scores(["q"], ["a"])
    assert KEY not in all_of(raised.value)


def test_it_goes_past_every_proxy_and_alone(serve, monkeypatch):
    """What the openai library would send of its own variables, meant for another endpoint, is not sent."""
    proxy, server = serve(completion("1")), serve(completion("4"))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    others = {"API_KEY": "o-key", "ADMIN_KEY": "o-admin", "ORG_ID": "o-org", "PROJECT_ID": "o-project"}
    others["CUSTOM_HEADERS"] = "Authorization: Bearer o-custom\nX-Other: o-other"
    for name, value in others.items():
        monkeypatch.setenv(f"OPENAI_{name}", value)
    for n, key in enumerate((KEY, "")):
        judge = geval.Client(Endpoint(server.url, "judge-1", key, timeout=5.0, retries=0))
        assert judge.scores(["q"], [f"a{n}"]).tolist() == [4.0]
        sent = server.headers[-1][1]
        assert sent["authorization"] == f"Bearer {key or 'none'}"
        assert "o-" not in " ".join(sent.values()) and sent.keys() <= endpoint.KEPT_HEADERS
    assert not proxy.requests


def test_an_error_of_the_library_does_hold_the_key(serve):
    """The control: what the tests above look for is there to be found where nothing is done about it."""
    server = serve(failing(401))
    with pytest.raises(openai.AuthenticationError) as raised:
        client(server)._openai.chat.completions.create(model="m", messages=[{"role": "user", "content": "q"}])
    assert KEY in all_of(raised.value)
