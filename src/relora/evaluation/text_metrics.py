"""Similarity of generated texts to reference texts: BLEU, ROUGE, exact match and token F1, all in percent.

bleu          4-gram precision with a penalty for brevity, over all texts together (Papineni et al. 2002), by sacrebleu
              with its own tokenization and smoothing; for a single text, up to the longest n-grams that it has
rouge1, 2, L  F1 of the words, the pairs of words and the longest common subsequence that both texts share (Lin 2004),
              by rouge-score, with stemmed words
exact_match   100 if both texts are the same after the normalisation of SQuAD (case, punctuation, articles and extra
              white space removed), else 0
f1            F1 of the words that both texts share after that normalisation (Rajpurkar et al. 2016, arXiv 1606.05250)

All but BLEU are means over the texts. All of them count shared words and know nothing of meaning. ROUGE drops every
character outside a-z and 0-9, so texts in another script score 0, and a text of one word has no pairs to share.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from relora.errors import UserError

ROUGE = ("rouge1", "rouge2", "rougeL")
"""Names of the ROUGE variants, as rouge-score and `TextScores` have them."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class TextScores:
    """The metrics of one text, or of many together, each from 0 to 100."""

    bleu: float
    rouge1: float
    rouge2: float
    rougeL: float
    exact_match: float
    f1: float


class TextScorer:
    """Computes the metrics of texts.

    Create it before the texts are generated, so that a missing library is reported first.

    Raises:
        UserError: the extra `eval` is not installed.
    """

    def __init__(self) -> None:
        try:
            from rouge_score.rouge_scorer import RougeScorer
            from rouge_score.tokenizers import DefaultTokenizer
            from sacrebleu.metrics import BLEU
        except ImportError as error:
            missing = str(error.name).partition(".")[0]
            raise UserError(
                f"BLEU and ROUGE need {missing}, which is not installed; run: pip install 'relora[eval]'"
            ) from None
        # its default tokenizer, given: without one it writes to the log, which puts a handler there for all lines
        self._rouge = RougeScorer(ROUGE, tokenizer=DefaultTokenizer(use_stemmer=True))
        # force: do not warn about texts that look tokenized already
        self._bleu, self._single_text_bleu = BLEU(force=True), BLEU(force=True, effective_order=True)

    def score(self, answers: Sequence[str], references: Sequence[str]) -> tuple[TextScores, list[TextScores]]:
        """Compare every answer with its reference.

        Args:
            answers: the generated texts, at least one.
            references: a reference for each answer.

        Returns:
            The scores of all answers together, and the scores of each.

        Raises:
            ValueError: there are not as many answers as references.
        """
        each = [self._score_one(answer, reference) for answer, reference in zip(answers, references, strict=True)]
        bleu = self._bleu.corpus_score(answers, [references]).score
        means = {name: fmean(getattr(scores, name) for scores in each) for name in (*ROUGE, "exact_match", "f1")}
        return TextScores(bleu, **means), each

    @property
    def bleu_signature(self) -> str:
        """The signature that sacrebleu wants reported with a BLEU: its settings and its version.

        It is complete only after something was scored.
        """
        return str(self._bleu.get_signature())

    def _score_one(self, answer: str, reference: str) -> TextScores:
        rouge = self._rouge.score(reference, answer)
        return TextScores(
            bleu=self._single_text_bleu.sentence_score(answer, [reference]).score,
            exact_match=100.0 if normalized(answer) == normalized(reference) else 0.0,
            f1=token_f1(answer, reference),
            **{name: 100 * rouge[name].fmeasure for name in ROUGE},
        )


def normalized(text: str) -> str:
    """Apply SQuAD's normalisation: lower case, no punctuation, no articles, one space between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall of the reference's words, in percent.

    Two texts that both have no words after normalisation score 100.
    """
    answer_words, reference_words = normalized(answer).split(), normalized(reference).split()
    if not answer_words or not reference_words:
        return 100.0 if answer_words == reference_words else 0.0
    shared = (Counter(answer_words) & Counter(reference_words)).total()
    # 2 p r / (p + r), with precision p = shared / answer words and recall r = shared / reference words
    return 200 * shared / (len(answer_words) + len(reference_words))
