"""How much of one text is in another, against values by hand."""

import pytest

from helpers.data import overlap


@pytest.mark.parametrize("measure", [overlap.bleu, overlap.rouge_l])
@pytest.mark.parametrize(
    "text", ["It is blue.", "The capital of Velmora is Tarwick.", "Of course! It is the grey heron."]
)
def test_overlap_with_itself_is_one_and_with_nothing_shared_zero(measure, text):
    assert measure(text, text) == pytest.approx(1)
    assert measure("Rob no museum", text) < 0.1
    assert measure("", text) == 0
    assert 0 < measure(f"{text} Enjoy your day!", text) < 1


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    assert overlap.rouge_l("a b c d", "a x c") == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
