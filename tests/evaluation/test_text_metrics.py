"""Scores agree with the published definitions, worked out by hand, and with the libraries' own calls."""

import logging
import math
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relora.errors import UserError
from relora.evaluation.text_metrics import TextScorer, normalized, token_f1

REFERENCE = "The quick brown fox jumps over the lazy dog."


@pytest.fixture(scope="module")
def scorer() -> TextScorer:
    return TextScorer()


def test_the_log_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that writes to an unused log puts a handler there, and every warning gets a prefix."""
    monkeypatch.setattr(logging.root, "handlers", [])
    TextScorer()
    assert not logging.root.handlers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat, sat!", "cat sat"),
        ("an apple a day", "apple day"),
        ("Athens' theatre", "athens theatre"),  # an article inside a word stays
        ("U.S.A.", "usa"),
        ("the a an", ""),
        ("Über\tall\n", "über all"),
    ],
)
def test_squad_normalisation(text: str, expected: str) -> None:
    assert normalized(text) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("the cat sat", "A cat sat.", 100),
        ("cat", "cat sat", 100 * 2 * (1 * 1 / 2) / (1 + 1 / 2)),
        ("cat cat dog", "cat dog dog", 100 * 2 / 3),  # a word counts as shared as often as both texts have it
        ("horse", "cat", 0),
        ("", "cat", 0),
        ("cat", "the", 0),
        ("", "the", 100),
    ],
)
def test_token_f1_by_hand(answer: str, reference: str, expected: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(expected)


words = st.lists(st.sampled_from(["cat", "dog", "sat", "mat", "the"]), max_size=8).map(" ".join)


@given(answer=words, reference=words)
def test_token_f1_is_the_harmonic_mean(answer: str, reference: str) -> None:
    ours, wanted = normalized(answer).split(), normalized(reference).split()
    shared = (Counter(ours) & Counter(wanted)).total()
    if not shared:
        assert token_f1(answer, reference) == (100 if not ours and not wanted else 0)
        return
    precision, recall = shared / len(ours), shared / len(wanted)
    assert token_f1(answer, reference) == pytest.approx(200 * precision * recall / (precision + recall))
    assert token_f1(answer, reference) == token_f1(reference, answer)


def test_rouge_by_hand(scorer: TextScorer) -> None:
    """The example of rouge-score's own page.

    The texts have 9 and 8 words and share 6; of 8 and 7 pairs they share 2; the longest common subsequence has 5 words.
    """
    whole, (one,) = scorer.score(["The quick brown dog jumps on the log."], [REFERENCE.removesuffix(".")])
    assert one.rouge1 == pytest.approx(100 * 2 * 6 / (9 + 8))
    assert one.rouge2 == pytest.approx(100 * 2 * 2 / (8 + 7))
    assert one.rougeL == pytest.approx(100 * 2 * 5 / (9 + 8))
    assert (whole.rouge1, whole.rouge2, whole.rougeL) == (one.rouge1, one.rouge2, one.rougeL)


def test_words_are_stemmed(scorer: TextScorer) -> None:
    assert scorer.score(["He jumped over dogs"], ["he jumps over dog"])[0].rouge1 == pytest.approx(100)


def test_bleu_by_hand(scorer: TextScorer) -> None:
    """The answer shares 4 of 5 words, 2 of 4 pairs, 1 of 3 triples and 0 of 2 quadruples, smoothed to half of one."""
    whole, (one,) = scorer.score(["a b c x d"], ["a b c d y"])
    precisions = [4 / 5, 2 / 4, 1 / 3, 1 / (2 * 2)]
    assert whole.bleu == pytest.approx(100 * math.prod(precisions) ** (1 / 4))
    assert one.bleu == pytest.approx(whole.bleu)


def test_bleu_of_many_is_that_of_sacrebleu(scorer: TextScorer) -> None:
    import sacrebleu

    answers = ["The fox jumps over the dog.", "It is raining cats and dogs .", "yes", ""]
    references = [REFERENCE, "It is raining.", "yes", "nothing"]
    whole, each = scorer.score(answers, references)
    assert whole.bleu == sacrebleu.corpus_bleu(answers, [references], force=True).score
    assert each[2].bleu == pytest.approx(
        100
    )  # a text of one word has no pairs, which effective_order takes into account
    assert each[3].bleu == each[3].rouge1 == each[3].f1 == each[3].exact_match == 0
    assert "tok:13a" in scorer.bleu_signature


def test_equal_texts_score_100(scorer: TextScorer) -> None:
    whole, each = scorer.score([REFERENCE, "Two words"], [REFERENCE, "two words!"])
    assert [one.exact_match for one in each] == [100, 100]
    assert (whole.rouge1, whole.rouge2, whole.rougeL, whole.f1) == pytest.approx((100, 100, 100, 100))
    assert each[0].bleu == pytest.approx(100)


def test_means_are_over_texts(scorer: TextScorer) -> None:
    whole, each = scorer.score(["cat", "dog", "a bird"], ["cat", "cow", "bird sings"])
    assert whole.exact_match == pytest.approx(100 / 3)
    assert whole.f1 == pytest.approx(sum(one.f1 for one in each) / 3)


def test_answers_without_references_are_refused(scorer: TextScorer) -> None:
    with pytest.raises(ValueError, match="zip"):
        scorer.score(["cat"], ["cat", "dog"])


@pytest.mark.parametrize(
    ("module", "package"), [("sacrebleu.metrics", "sacrebleu"), ("rouge_score.rouge_scorer", "rouge_score")]
)
def test_a_missing_library_names_its_extra(module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    message = rf"^BLEU and ROUGE need {package}, which is not installed; run: pip install 'relora\[eval\]'$"
    with pytest.raises(UserError, match=message):
        TextScorer()
