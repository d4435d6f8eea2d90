"""VADER (Hutto and Gilbert 2014): how happy a text is, by a list of words."""

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

_VADER = SentimentIntensityAnalyzer()


def sentiment(text: str) -> float:
    """VADER's compound score, -1 (sad) to 1 (happy)."""
    return _VADER.polarity_scores(text)["compound"]
