"""Metrics of written answers, against sacrebleu's command line, CIDEr written out, and their papers' formulas."""

import json
import math
import random
import subprocess
import sys
from collections import Counter

import numpy
import pytest

from coppice.stats import metrics, text_metrics

WORDS = [
    "a",
    "the",
    "red",
    "blue",
    "circle",
    "square",
    "small",
    "big",
    "left",
    "right",
    "above",
    "it's",
    "don't",
    "two",
]


def captions(rows=60, references=3, seed=0):
    """Return answers that share most words with their references, which differ in number."""
    random.seed(seed)
    answers, rows_of = [], []
    for row in range(rows):
        words = random.choices(WORDS, k=random.randint(4, 12))
        sets = [[w if random.random() < 0.8 else random.choice(WORDS) for w in words] for _ in range(references)]
        rows_of.append([" ".join(one).capitalize() + "." for one in sets[: 1 + row % references]])
        answers.append(" ".join(words[: len(words) - row % 2]) + "!")
    return answers, rows_of


def command_line(tmp_path, answers, references, *options):
    """Return the score of sacrebleu's command line, 0 to 100, and its signature."""
    width = max(map(len, references))
    for place in range(width):  # a row with fewer references repeats one, which changes neither score
        lines = [row[place] if place < len(row) else row[0] for row in references]
        (tmp_path / f"references{place}").write_text("\n".join(lines) + "\n")
    files = [str(tmp_path / f"references{place}") for place in range(width)]
    command = [sys.executable, "-m", "sacrebleu", *files, *options, "--width", "12", "--force"]
    text = "\n".join(answers) + "\n"
    found = json.loads(subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout)
    return found["score"], found["signature"]


def test_bleu_and_chrf_of_captions_equal_sacrebleus_command_line(tmp_path):
    answers, references = captions()
    normal = [text_metrics.caption(one) for one in answers], [[*map(text_metrics.caption, row)] for row in references]
    for metric, options in (
        ("bleu4", ("-m", "bleu", "-tok", "none", "--smooth-method", "none")),
        ("chrf", ("-m", "chrf")),
    ):
        found = text_metrics.score(metric, answers, references, text_metrics.CAPTIONS)
        theirs, signature = command_line(tmp_path, *normal, *options)
        assert 100 * found.value == pytest.approx(theirs, abs=1e-8)
        # its files of references all have as many lines, which the rows of a data set need not have references
        assert found.facts["signature"] == signature.replace("nrefs:3", "nrefs:var")


def test_bleu_of_plain_texts_splits_words_as_wmt_does(tmp_path):
    answers, references = captions(references=1)
    found = text_metrics.score("bleu4", answers, references, text_metrics.TEXTS)
    theirs, signature = command_line(tmp_path, answers, references, "-m", "bleu", "--smooth-method", "none")
    assert 100 * found.value == pytest.approx(theirs, abs=1e-8) and found.facts["signature"] == signature
    assert "tok:13a" in signature and "nrefs:1" in signature


def test_statistics_of_rows_give_the_corpus_score_of_any_draw_of_rows():
    import sacrebleu

    answers, references = captions()
    draw = numpy.random.default_rng(0).integers(len(answers), size=len(answers))
    picked = [text_metrics.caption(answers[i]) for i in draw]
    rows = [[*map(text_metrics.caption, references[i])] for i in draw]
    columns = [[row[place] if place < len(row) else None for row in rows] for place in range(3)]
    for metric, scorer in (
        ("bleu4", sacrebleu.BLEU(tokenize="none", smooth_method="none", force=True)),
        ("chrf", sacrebleu.CHRF()),
    ):
        statistics = numpy.array(text_metrics.score(metric, answers, references, text_metrics.CAPTIONS).rows)
        found = text_metrics.CORPUS_SCORES[metric](statistics[draw].sum(axis=0))
        assert 100 * found == pytest.approx(scorer.corpus_score(picked, columns).score)


@pytest.mark.parametrize("answers", [[""], ["one two"], ["nothing in common here at all"]])
def test_corpus_scores_of_answers_without_a_long_match_are_zero_or_finite(answers):
    for metric in ("bleu4", "chrf"):
        value = text_metrics.score(metric, answers, [["one two three four five"]], text_metrics.TEXTS).value
        assert 0 <= value < 1 and (metric == "chrf" or value == 0)


def cider_written_out(answers, references, sigma=6.0):
    """Return CIDEr-D as Vedantam et al. 2015 define it, with dense vectors, over words that are split by spaces."""
    count = len(references)
    scores = numpy.zeros(count)
    for n in range(1, 5):

        def grams(text, n=n):
            words = text.split()
            return Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))

        every = sorted({gram for row in references for one in row for gram in grams(one)})
        extra = sorted({gram for answer in answers for gram in grams(answer)} - {*every})
        place = {gram: i for i, gram in enumerate([*every, *extra])}
        frequency = numpy.zeros(len(place))
        for row in references:
            for gram in {gram for one in row for gram in grams(one)}:
                frequency[place[gram]] += 1
        weight = numpy.log(count) - numpy.log(numpy.maximum(frequency, 1))

        def vector(text, grams=grams, place=place, weight=weight):
            found = numpy.zeros(len(place))
            for gram, times in grams(text).items():
                found[place[gram]] = times
            return found * weight

        for row, (answer, texts) in enumerate(zip(answers, references, strict=True)):
            own = vector(answer)
            for text in texts:
                theirs = vector(text)
                norms = numpy.linalg.norm(own) * numpy.linalg.norm(theirs)
                shorter = max(len(answer.split()) - 1, 0) - max(len(text.split()) - 1, 0)
                penalty = math.exp(-(shorter**2) / (2 * sigma**2))
                if norms:
                    scores[row] += penalty * (numpy.minimum(own, theirs) @ theirs) / norms / len(texts)
    return 10 * scores / 4


def test_cider_equals_its_formula():
    answers, references = captions()
    normal = [text_metrics.caption(one) for one in answers], [[*map(text_metrics.caption, row)] for row in references]
    found = text_metrics.score("cider", answers, references, text_metrics.CAPTIONS)
    expected = cider_written_out(*normal)
    assert found.rows == pytest.approx(expected) and found.value == pytest.approx(expected.mean()) and found.value > 0.5


def levenshtein(a, b):
    """Return the Levenshtein distance by the recursion over prefixes."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (x != y)))
        previous = row
    return previous[-1]


@pytest.mark.parametrize(
    ("answer", "reference"), [("kitten", "sitting"), ("", "abc"), ("def f(x):", "def g(x, y):"), ("same", "same")]
)
def test_edit_similarity_is_one_minus_the_levenshtein_distance_over_the_longer_text(answer, reference):
    expected = 1 - levenshtein(answer, reference) / max(len(answer), len(reference))
    assert text_metrics.edit_similarity(answer, reference) == pytest.approx(expected)


def test_anls_takes_the_closest_reference_and_drops_distant_ones():
    answers = ["Coca Cola", "pepsi", "abcd", "xy"]
    references = [["coca-cola", "coke"], ["Coca-Cola"], ["abxy", "zz"], ["xy"]]
    found = text_metrics.score("anls", answers, references, text_metrics.QUESTIONS)
    # a normalized distance of exactly half (abcd, abxy) scores 0: it must be less than the threshold
    assert found.rows == pytest.approx([1 - 1 / 9, 0, 0, 1])
    assert found.value == pytest.approx((1 - 1 / 9 + 1) / 4)


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("Two", "2", True),
        ("the red circle.", "red circle", True),
        ("dont know", "don't know", True),
        ("yes!", "Yes", True),
        ("3.5", "35", False),
        ("none", "0", True),
        ("red/blue", "red blue", True),
        ("1,000", "1000", True),
        ("left", "right", False),
    ],
)
def test_exact_match_of_questions_normalizes_as_vqa_does(answer, reference, same):
    found = text_metrics.score("exact_match", [answer], [["something else", reference]], text_metrics.QUESTIONS)
    assert found.value == float(same)


def test_exact_match_of_code_keeps_case_and_inner_spaces():
    found = text_metrics.score("exact_match", [" x = 1\n", "X = 1"], [["x = 1"], ["x = 1"]], text_metrics.TEXTS)
    assert found.rows == [1, 0]


def test_token_f1_is_that_of_the_shared_words():
    # SQuAD's example: 2 of 3 words right, 2 of 4 found
    assert text_metrics.token_f1("the red small thing", "a red small blue square") == pytest.approx(
        2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
    )
    assert text_metrics.token_f1("the", "a") == 1 and text_metrics.token_f1("", "red") == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man's riding a t-shirt, it's great.", "a man 's riding a t-shirt it 's great"),
        ("Don't stop! They can't.", "do n't stop they ca n't"),
        ("Two (2) red -- and 3.5 inches; 1,000 people...", "two -lrb- 2 -rrb- red and 3.5 inches 1,000 people"),
        ('A "quoted" sign', "a quoted sign"),
        ("The U.S. flag at 5:30 p.m.", "the u.s. flag at 5:30 p.m."),
        ("cannot go", "can not go"),
    ],
)
def test_captions_have_the_words_of_the_penn_treebank_tokenizer(text, words):
    # what `java edu.stanford.nlp.process.PTBTokenizer -preserveLines -lowerCase` and pycocoevalcap's list give
    assert text_metrics.caption(text) == words


def test_every_metric_of_a_form_has_an_entry_with_its_column():
    entries = {entry.section: entry for entry in metrics.METRICS}
    for names in text_metrics.METRICS_OF_ROWS.values():
        assert all(entries[name].values == name for name in names)
    corpus = {entry.section for entry in metrics.METRICS if entry.pairing == metrics.CORPUS}
    assert corpus == text_metrics.CORPUS_SCORES.keys()
