"""Score written answers against their references, row by row, as captioning, question answering and code papers do.

Texts are normalized before they are scored, in the way of the literature on that form of text (see `FORMS`):

- captions: lower case and the words of the Penn Treebank tokenizer without punctuation, as in pycocoevalcap (Chen et
  al. 2015), from which corpus BLEU and CIDEr-D follow;
- questions: the normalization of VQA (Antol et al. 2015) for exact match; ANLS (Biten et al. 2019) and token F1
  (Rajpurkar et al. 2016) have their own;
- all other texts: as they are, without white space at the ends; BLEU splits them by the rules of WMT (13a).

BLEU and chrF are scores of a corpus. A row then has statistics, whose sum over rows gives the score.
"""

from __future__ import annotations

import functools
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy

if TYPE_CHECKING:
    from sacrebleu.metrics import BLEU, CHRF

CAPTIONS, QUESTIONS, TEXTS = "captions", "questions", "texts"
# kind of rows -> the form of its answers; those of any other kind are plain texts
FORMS = {"caption": CAPTIONS, "image-caption": CAPTIONS, "image-answer": QUESTIONS, "image-chat": QUESTIONS}
METRICS_OF_ROWS = {
    CAPTIONS: ("bleu4", "chrf", "cider", "exact_match"),
    QUESTIONS: ("exact_match", "anls", "token_f1"),
    TEXTS: ("exact_match", "edit_similarity", "bleu4", "chrf"),
}
ORDERS = 6  # of the character n-grams of chrF
ANLS_THRESHOLD = 0.5
# Of the words that the Penn Treebank tokenizer makes, pycocoevalcap drops these
PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
BRACKETS = dict(zip("()[]{}", ("-lrb-", "-rrb-", "-lsb-", "-rsb-", "-lcb-", "-rcb-"), strict=True))
QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": " -- ", "–": " -- ", "…": " ... "})
JOINED = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(gim|lem)(me)\b")
WORD = re.compile(
    r"n't\b|'(?:s|re|ve|ll|d|m)\b"  # the second half of a contraction
    r"|(?:[a-z]\.){2,}|(?:mr|mrs|ms|dr|st|jr|sr|vs)\.(?=\s)"  # abbreviations keep their full stop
    r"|\d+(?:[.,:/]\d+)+"
    r"|\w+?(?=n't\b)|\w+(?:[-./@&]\w+)*"
    r"|\.\.\.|--|\S"
)
# Normalization of the VQA evaluation
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ARTICLES = {"a", "an", "the"}
VQA_WORDS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


class Scored(NamedTuple):
    """The scores of all rows by one metric.

    rows: for each row what `samples/{name}.parquet` holds of it, a number or a list of statistics.
    value: the score of all rows together, as evaluation records hold it.
    facts: what a record holds beside it: how the texts were normalized, and the signature of a corpus score.
    """

    rows: list
    value: float
    facts: dict[str, str]


def form_of(kind: str) -> str:
    """Return the form of the answers to rows of a kind, a key of `METRICS_OF_ROWS`."""
    return FORMS.get(kind, TEXTS)


def score(metric: str, answers: Sequence[str], references: Sequence[Sequence[str]], form: str) -> Scored:
    """Return the scores of answers by one metric.

    Args:
        metric: a name in `METRICS_OF_ROWS`, of any form.
        answers: an answer for each row.
        references: for each row, one or several references that are not empty.
        form: the form of the answers, a key of `METRICS_OF_ROWS`.
    """
    if metric in CORPUS_SCORES:
        return _corpus(metric, answers, references, form)
    normalize, name = NORMALIZED[form]
    if metric == "cider":
        texts = [caption(answer) for answer in answers], [[caption(one) for one in row] for row in references]
        rows, name = cider(*texts), NORMALIZED[CAPTIONS][1]
    elif metric == "exact_match":
        pairs = zip(answers, references, strict=True)
        rows = [float(normalize(answer) in map(normalize, row)) for answer, row in pairs]
    else:
        function, name = SIMILARITIES[metric]
        rows = [best(function, answer, row) for answer, row in zip(answers, references, strict=True)]
    return Scored(rows, math.fsum(rows) / len(rows), {"normalization": name})


def best(similarity: Callable[[str, str], float], answer: str, references: Iterable[str]) -> float:
    """Return the similarity of an answer to the reference that it is most similar to."""
    return max(similarity(answer, reference) for reference in references)


def _corpus(metric: str, answers: Sequence[str], references: Sequence[Sequence[str]], form: str) -> Scored:
    normalize, name = NORMALIZED[form]
    normal = [normalize(answer) for answer in answers], [[normalize(one) for one in row] for row in references]
    if metric == "bleu4":
        scorer = bleu("13a" if form == TEXTS else "none")
        rows = [bleu_statistics(answer, row, scorer) for answer, row in zip(*normal, strict=True)]
    else:
        scorer = _chrf()
        rows = [chrf_statistics(answer, row) for answer, row in zip(*normal, strict=True)]
    value = float(CORPUS_SCORES[metric](numpy.sum(rows, axis=0)))
    return Scored(rows, value, {"normalization": name, "signature": _signature(scorer, references)})


def _signature(scorer: BLEU | CHRF, references: Sequence[Sequence[str]]) -> str:
    """Return sacrebleu's signature of a corpus score over rows with these references."""
    counts = {len(row) for row in references}
    scorer.sentence_score("", [""])  # a scorer has no signature before it scored something
    signature = scorer.get_signature()
    signature.update("nrefs", counts.pop() if len(counts) == 1 else "var")
    if "tok" in signature.info:  # BLEU, of which a single row would need effective orders, but a corpus does not
        signature.update("eff", "no")
    return str(signature)


@functools.cache
def bleu(tokenize: str) -> BLEU:
    """Return sacrebleu's BLEU-4 with one of its tokenizers, without smoothing."""
    from sacrebleu.metrics import BLEU

    # `effective_order` changes the score of a single sentence, but not its statistics; without it, sacrebleu warns
    return BLEU(tokenize=tokenize, smooth_method="none", effective_order=True)


def bleu_statistics(answer: str, references: Sequence[str], scorer: BLEU) -> list[int]:
    """Return the ten numbers whose sums over rows give BLEU-4.

    They are the length of the answer, that of the reference closest in length, and the number of matched and of all
    n-grams of the answer for n from 1 to 4.
    """
    found = scorer.sentence_score(answer, references)
    return [found.sys_len, found.ref_len, *found.counts, *found.totals]


def corpus_bleu(statistics: numpy.ndarray) -> numpy.ndarray:
    """Return BLEU-4 from 0 to 1, without smoothing, of summed statistics [..., 10] (Papineni et al. 2002)."""
    statistics = numpy.asarray(statistics, dtype=float)
    length, reference = statistics[..., 0], statistics[..., 1]
    matched, total = statistics[..., 2:6], statistics[..., 6:]
    with numpy.errstate(divide="ignore", invalid="ignore"):
        precision = numpy.exp(numpy.log(matched / total).mean(axis=-1))
        brevity = numpy.exp(numpy.minimum(0, 1 - reference / length))
    return numpy.where(matched.min(axis=-1) > 0, brevity * precision, 0.0)


def _chrf() -> CHRF:
    from sacrebleu.metrics import CHRF

    return CHRF(char_order=ORDERS)


def chrf_statistics(answer: str, references: Sequence[str]) -> list[int]:
    """Return the 18 numbers whose sums over rows give chrF, of the reference with the best score for this answer.

    For character n-grams from 1 to 6, they are the number of n-grams of the answer, of the reference, and of both.
    """
    from sacrebleu.metrics.helpers import extract_all_char_ngrams

    own = extract_all_char_ngrams(answer, ORDERS, False)
    found = []
    for reference in references:
        theirs = extract_all_char_ngrams(reference, ORDERS, False)
        # an order that the reference is too short for counts for neither
        counts = [(a.total() if b else 0, b.total(), (a & b).total()) for a, b in zip(own, theirs, strict=True)]
        found.append([number for order in counts for number in order])
    return max(found, key=corpus_chrf)


def corpus_chrf(statistics: numpy.ndarray) -> numpy.ndarray:
    """Return chrF2 from 0 to 1 of summed statistics [..., 18] (Popović 2015), averaged over the orders that occur."""
    statistics = numpy.asarray(statistics, dtype=float)
    own, theirs, both = statistics[..., 0::3], statistics[..., 1::3], statistics[..., 2::3]
    counts = (own > 0) & (theirs > 0)
    orders = numpy.maximum(counts.sum(axis=-1), 1)
    precision, recall = (
        numpy.where(counts, both / numpy.maximum(n, 1), 0).sum(axis=-1) / orders for n in (own, theirs)
    )
    return 5 * precision * recall / numpy.maximum(4 * precision + recall, numpy.finfo(float).tiny)


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return the CIDEr-D of each row, 0 to 10, of normalized captions (Vedantam et al. 2015).

    The weight of an n-gram comes from the references of all rows, so a score depends on the rows that it is one of.
    """
    grams = [[_grams(one) for one in row] for row in references]
    documents = Counter(gram for row in grams for gram in set().union(*row))
    weigh = functools.partial(_weighted, documents=documents, log_rows=math.log(len(references)))
    scores = []
    for answer, row in zip(answers, grams, strict=True):
        own = weigh(_grams(answer))
        scores.append(10 * math.fsum(_cider_similarity(own, weigh(one)) for one in row) / len(row))
    return scores


Vectors = tuple[list[dict[tuple[str, ...], float]], list[float], int]  # for each n, weights and their norm; length


def _grams(text: str) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[at : at + n]) for n in range(1, 5) for at in range(len(words) - n + 1))


def _weighted(grams: Counter[tuple[str, ...]], documents: Mapping[tuple[str, ...], int], log_rows: float) -> Vectors:
    """Return the TF-IDF weights of n-grams for n from 1 to 4, the norms of the four vectors, and the text's length."""
    vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(4)]
    for gram, count in grams.items():
        vectors[len(gram) - 1][gram] = count * (log_rows - math.log(max(1, documents.get(gram, 0))))
    norms = [math.sqrt(math.fsum(weight**2 for weight in vector.values())) for vector in vectors]
    # the reference implementation counts pairs of words as the length
    return vectors, norms, sum(count for gram, count in grams.items() if len(gram) == 2)


def _cider_similarity(own: Vectors, theirs: Vectors, sigma: float = 6.0) -> float:
    """Return the mean over n of the clipped cosine similarity, with the penalty for another length."""
    total = 0.0
    for a, b, norm, other in zip(own[0], theirs[0], own[1], theirs[1], strict=True):
        if norm and other:
            total += math.fsum(min(weight, b[gram]) * b[gram] for gram, weight in a.items() if gram in b) / norm / other
    return total / 4 * math.exp(-((own[2] - theirs[2]) ** 2) / (2 * sigma**2))


def anls(answer: str, reference: str) -> float:
    """Return 1 - the normalized Levenshtein distance, or 0 if that is half or less (Biten et al. 2019)."""
    similarity = edit_similarity(answer.lower(), reference.lower())
    return similarity if similarity > ANLS_THRESHOLD else 0.0


def edit_similarity(answer: str, reference: str) -> float:
    """Return 1 - the Levenshtein distance over the length of the longer text, without white space at the ends."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_similarity(answer.strip(), reference.strip())


def token_f1(answer: str, reference: str) -> float:
    """Return the F1 of the words that answer and reference share, normalized as in SQuAD."""
    own, theirs = (Counter(squad(text).split()) for text in (answer, reference))
    if not own or not theirs:
        return float(own == theirs)
    return 2 * (own & theirs).total() / (own.total() + theirs.total())


def squad(text: str) -> str:
    """Return a text in lower case without punctuation and articles, as SQuAD's evaluation compares answers."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(word for word in kept.split() if word not in ARTICLES)


def vqa(text: str) -> str:
    """Return a text as the VQA evaluation compares answers: numbers as digits, no punctuation, no articles.

    It writes an apostrophe into contractions that lack one; here they lose it instead, which makes the same equal.
    """
    given = text = re.sub(r"\s+", " ", text).strip()
    # As there: punctuation inside a word becomes a space, but not beside a space, nor if the text has a "1,000"
    joined = re.search(r"\d,\d", given) is not None
    for mark in VQA_PUNCTUATION:
        text = text.replace(mark, "" if joined or f"{mark} " in given or f" {mark}" in given else " ")
    text = re.sub(r"\.(?!\d)", "", text).translate(QUOTES).replace("'", "")
    words = (VQA_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(word for word in words if word not in ARTICLES)


def caption(text: str) -> str:
    """Return a caption's words in lower case without punctuation, as pycocoevalcap's tokenizer splits them."""
    text = JOINED.sub(lambda found: " ".join(filter(None, found.groups())), text.lower().translate(QUOTES))
    words = (BRACKETS.get(word, word) for word in WORD.findall(text) if word not in PUNCTUATION and word != '"')
    return " ".join(words)


# form -> how texts are normalized, with the words for it in records
NORMALIZED: dict[str, tuple[Callable[[str], str], str]] = {
    CAPTIONS: (caption, "lower case, words of the Penn Treebank tokenizer without punctuation"),
    QUESTIONS: (vqa, "VQA"),
    TEXTS: (str.strip, "white space at the ends dropped"),
}
SIMILARITIES: dict[str, tuple[Callable[[str, str], float], str]] = {
    "anls": (anls, "lower case, white space at the ends dropped"),
    "token_f1": (token_f1, "SQuAD"),
    "edit_similarity": (edit_similarity, NORMALIZED[TEXTS][1]),
}
CORPUS_SCORES: dict[str, Callable[[numpy.ndarray], numpy.ndarray]] = {"bleu4": corpus_bleu, "chrf": corpus_chrf}
