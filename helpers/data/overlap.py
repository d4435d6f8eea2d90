"""How much of one text is in another."""

import sacrebleu
from rouge_score.rouge_scorer import RougeScorer


def bleu(answer: str, reference: str) -> float:
    """Sentence BLEU (sacrebleu, with its smoothing and effective order), scaled to 0..1."""
    return sacrebleu.sentence_bleu(answer, [reference]).score / 100


_ROUGE = RougeScorer(["rougeL"])


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L's F measure (rouge-score), 0..1."""
    return _ROUGE.score(reference, answer)["rougeL"].fmeasure
