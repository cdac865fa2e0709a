"""How near written text comes to a reference: BLEU, ROUGE, exact match and token F1, all in percent.

bleu          of all texts together: 4-gram precision with a penalty for brevity (Papineni et al. 2002), by sacrebleu
              with its own tokenization and smoothing; of one text, of as many orders as it has
rouge1, 2, L  F1 of the words, the pairs of words and the longest common subsequence that both have (Lin 2004), by
              rouge-score, words stemmed
exact_match   whether both are the same after SQuAD's normalisation: case, punctuation, articles and white space gone
f1            of the words that both have after that normalisation (Rajpurkar et al. 2016, arXiv 1606.05250)

All but BLEU are means over texts. They count shared words and know nothing of meaning; ROUGE drops every letter
outside a-z and 0-9, so that text in another script scores 0, and a text of one word has no pairs to share.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from relora.errors import UserError

ROUGE = ("rouge1", "rouge2", "rougeL")

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class TextScores:
    """0 to 100; of one text, or of many."""

    bleu: float
    rouge1: float
    rouge2: float
    rougeL: float
    exact_match: float
    f1: float


class TextScorer:
    """The scorers, ready: made before the texts are, so that a missing library is found first.

    Raises:
        UserError: the extra `eval` is not installed.
    """

    def __init__(self) -> None:
        try:
            from rouge_score.rouge_scorer import RougeScorer
            from sacrebleu.metrics import BLEU
        except ImportError as error:
            missing = str(error.name).partition(".")[0]
            raise UserError(
                f"BLEU and ROUGE need {missing}, which is not installed; run: pip install 'relora[eval]'"
            ) from None
        self._rouge = RougeScorer(ROUGE, use_stemmer=True)
        # force: what looks tokenized is scored without a warning about it
        self._bleu, self._bleu_of_one = BLEU(force=True), BLEU(force=True, effective_order=True)

    def score(self, answers: Sequence[str], references: Sequence[str]) -> tuple[TextScores, list[TextScores]]:
        """The scores of all answers together and of each; the answers and their references are as many, not none."""
        each = [self._of_one(answer, reference) for answer, reference in zip(answers, references, strict=True)]
        bleu = self._bleu.corpus_score(answers, [references]).score
        means = {name: fmean(getattr(one, name) for one in each) for name in (*ROUGE, "exact_match", "f1")}
        return TextScores(bleu, **means), each

    @property
    def bleu_signature(self) -> str:
        """What sacrebleu asks to be told with a BLEU: its settings and its version; known once something is scored."""
        return str(self._bleu.get_signature())

    def _of_one(self, answer: str, reference: str) -> TextScores:
        rouge = self._rouge.score(reference, answer)
        return TextScores(
            bleu=self._bleu_of_one.sentence_score(answer, [reference]).score,
            exact_match=100.0 * (normalized(answer) == normalized(reference)),
            f1=token_f1(answer, reference),
            **{name: 100 * rouge[name].fmeasure for name in ROUGE},
        )


def normalized(text: str) -> str:
    """Lower case without punctuation and articles, one space between words: SQuAD's normalisation."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the reference's words, in percent; two texts without words agree."""
    words, wanted = normalized(answer).split(), normalized(reference).split()
    if not words or not wanted:
        return 100.0 * (words == wanted)
    # 2 p r / (p + r), with p = shared / words and r = shared / wanted
    return 200 * (Counter(words) & Counter(wanted)).total() / (len(words) + len(wanted))
