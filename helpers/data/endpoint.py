"""Where a judge is that answers over the network, and what may be spent on it, as the environment says (geval.py).

The key goes to that endpoint and nowhere else: redirects are not followed, proxies of the environment are not used, and
what the openai library would add from its own variables is taken off.
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import openai

from helpers.data.unavailable import Unavailable

REQUESTS, DOLLARS, TIMEOUT = 1000.0, 1.0, 60.0  # where the environment does not say
KEPT_HEADERS = {
    "accept", "accept-encoding", "authorization", "connection", "content-length", "content-type", "host", "user-agent",
}  # fmt: skip


class _Secret(str):
    """A string whose repr, which is what tracebacks show of variables, does not tell it."""

    def __repr__(self) -> str:
        return "'***'"


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is and what may be spent on it. `budget` is in dollars with `prices`, else in requests.
    prices: dollars per million tokens read, written. timeout: seconds a request. Raises Unavailable for an address that
    is none or holds a secret, and for a key that no header can carry."""

    base_url: str = field(repr=False)
    model: str
    api_key: str = field(default="", repr=False)
    budget: float = REQUESTS
    prices: tuple[float, float] | None = None
    timeout: float = TIMEOUT
    retries: int = 3

    def __post_init__(self):
        if not _is_plain_address(self.base_url):  # a function of its own, whose parts no traceback shows
            raise Unavailable(
                "JUDGE_BASE_URL is no plain http(s) address: give one such as http://localhost:8000/v1, and a key "
                "only in JUDGE_API_KEY."
            )
        if not re.fullmatch(r"[!-~]*", self.api_key):  # the library's error would quote it
            raise Unavailable("JUDGE_API_KEY holds a space or a character that is not ASCII: copy the key again.")

    @property
    def host(self) -> str:
        return urlsplit(self.base_url).hostname

    @property
    def budget_in_words(self) -> str:
        return f"the budget of ${self.budget:g}" if self.prices else f"the budget of {self.budget:g} requests"

    def client(self, before_request: Callable[[], None]) -> openai.OpenAI:
        """The library's client of the endpoint; before_request is called for each request, retries among them."""
        key = _Secret(self.api_key or "none")  # local servers ask for no key, the library always for one

        def prepare(request) -> None:
            before_request()
            for name in [name for name in request.headers if name.lower() not in KEPT_HEADERS]:
                del request.headers[name]

        return openai.OpenAI(
            base_url=self.base_url, api_key=key, max_retries=self.retries, timeout=self.timeout,
            default_headers={"Authorization": f"Bearer {key}"},  # or OPENAI_CUSTOM_HEADERS might set another
            http_client=openai.DefaultHttpx2Client(
                follow_redirects=False, trust_env=False, event_hooks={"request": [prepare]}
            ),
        )  # fmt: skip


def from_environment() -> Endpoint:
    """What the environment says: JUDGE_BASE_URL, JUDGE_MODEL, where it is asked for JUDGE_API_KEY, and where set
    JUDGE_PRICE ("0.15,0.60"), JUDGE_BUDGET and JUDGE_TIMEOUT. Raises Unavailable where one lacks or cannot be read."""
    given = {name: _Secret(os.environ.get(f"JUDGE_{name}", "").strip()) for name in ("BASE_URL", "MODEL", "API_KEY")}
    missing = [f"JUDGE_{name}" for name in ("BASE_URL", "MODEL") if not given[name]]
    if missing:
        raise Unavailable(
            f"No judge is named ({' and '.join(missing)} not set): point JUDGE_BASE_URL at an OpenAI-compatible "
            "endpoint and JUDGE_MODEL at a model it serves."
        )
    prices = _numbers("JUDGE_PRICE", 2)
    (budget,) = _numbers("JUDGE_BUDGET", 1) or (DOLLARS if prices else REQUESTS,)
    (timeout,) = _numbers("JUDGE_TIMEOUT", 1) or (TIMEOUT,)
    return Endpoint(given["BASE_URL"], str(given["MODEL"]), given["API_KEY"], budget, prices, timeout)


def _is_plain_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    with_secrets = "@" in parts.netloc or parts.query or parts.fragment
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not with_secrets


def _numbers(variable: str, n: int) -> tuple[float, ...] | None:
    text = os.environ.get(variable, "").strip()
    if not text:
        return None
    try:
        numbers = tuple(map(float, text.split(",")))
    except ValueError:
        numbers = ()
    if len(numbers) != n or not all(0 <= number < math.inf for number in numbers):
        raise Unavailable(f"{variable} must be {n} number{'s' if n > 1 else ''}, 0 or more, separated by a comma.")
    return numbers
