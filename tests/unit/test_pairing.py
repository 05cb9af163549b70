"""Statistics of scores of a corpus, of ratios and of ranks, against paired bootstraps that draw rows."""

import numpy
import pandas
import pytest
from synthetic_kinds import SKILL, mixed

from coppice.core import records
from coppice.stages.select import margins
from coppice.stats import across_models, metrics, pairing, stored_samples, text_metrics

DENSE, PRUNED, TUNED = STAGES = tuple(SKILL)
DRAWS = 2000


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Return a built study of a captioner and a dual encoder."""
    return mixed(tmp_path_factory.mktemp("study"), items=200, Cap="captioner", Clip="dual").build()


def folders(study, model="Cap"):
    return [study.folder(stage, model, None if stage == DENSE else "best_acc") for stage in STAGES]


def table(study, stage, name, model="Cap"):
    return pandas.read_parquet(folders(study, model)[STAGES.index(stage)] / f"samples/{name}.parquet")


def compared(study, model="Cap"):
    return records.read(folders(study, model)[-1] / "comparison.json")


def draws(rows):
    return numpy.random.default_rng(0).integers(rows, size=(DRAWS, rows))


@pytest.mark.parametrize("name", ["bleu4", "chrf"])
def test_the_interval_of_a_corpus_score_is_that_of_a_paired_bootstrap_of_rows(study, name):
    score = text_metrics.CORPUS_SCORES[name]
    rows = {stage: numpy.stack(table(study, stage, "captions")[name]).astype(float) for stage in STAGES}
    found = {stage: [score(own[draw].sum(axis=0)) for draw in draws(200)] for stage, own in rows.items()}
    low, high = numpy.quantile(numpy.subtract(found[TUNED], found[PRUNED]), [0.025, 0.975])
    part = compared(study)[name]["captions"]
    assert part["change"]["value"] == pytest.approx(score(rows[TUNED].sum(0)) - score(rows[PRUNED].sum(0)))
    assert part["change"]["interval"] == pytest.approx([low, high], abs=0.1 * (high - low))
    shares = numpy.subtract(found[TUNED], found[PRUNED]) / numpy.subtract(found[DENSE], found[PRUNED])
    low, high = numpy.quantile(shares, [0.025, 0.975])
    assert part["recovered"]["interval"] == pytest.approx([low, high], abs=0.1 * (high - low))
    assert part["verdict"] == "better" and part["resampled"]["count"] == 200


def test_a_corpus_score_of_records_equals_sacrebleus(study):
    import sacrebleu

    rows = table(study, TUNED, "captions")
    normal = [text_metrics.caption(text) for text in rows["answer"]]
    columns = [[text_metrics.caption(row[place]) for row in rows["references"]] for place in range(2)]
    scorer = sacrebleu.BLEU(tokenize="none", smooth_method="none", force=True)
    assert 100 * compared(study)["bleu4"]["captions"][TUNED] == pytest.approx(
        scorer.corpus_score(normal, columns).score
    )


def test_the_perplexity_of_answers_is_paired_by_rows_of_unequal_length(study):
    rows = {stage: table(study, stage, "captions") for stage in STAGES}
    losses, tokens = (
        {stage: own[key].to_numpy() for stage, own in rows.items()} for key in ("answer_nll", "answer_tokens")
    )
    logs = {stage: losses[stage].sum() / tokens[stage].sum() for stage in STAGES}
    drawn = {stage: [losses[stage][draw].sum() / tokens[stage][draw].sum() for draw in draws(200)] for stage in STAGES}
    part = compared(study)["answer_ppl"]["captions"]
    assert part[TUNED] == pytest.approx(numpy.exp(logs[TUNED]))
    assert part["ratio"]["value"] == pytest.approx(numpy.exp(logs[TUNED] - logs[PRUNED]))
    # all rows lose alike here, so the ratio hardly varies, and the perplexities do
    [found] = pairing.values(metrics.named("answer_ppl.captions"), folders(study), "")
    bounds = found.means(STAGES).contrast({TUNED: 1})["interval"]
    low, high = numpy.quantile(drawn[TUNED], [0.025, 0.975])
    assert bounds == pytest.approx([low, high], abs=0.1 * (high - low))


def test_ranks_are_right_up_to_the_depth_and_have_an_exact_test(study):
    from scipy.stats import binomtest

    for depth in (1, 5, 10):
        before, after = (
            table(study, stage, "pairs.image_to_text", "Clip")["rank"] <= depth for stage in (PRUNED, TUNED)
        )
        part = compared(study, "Clip")[f"image_to_text_r{depth}"]["pairs"]
        assert part[TUNED] == pytest.approx(after.mean()) and part["n"] == 200
        gained, lost = int((~before & after).sum()), int((before & ~after).sum())
        assert (part["gained_items"], part["lost_items"]) == (gained, lost)
        assert part["p"] == pytest.approx(binomtest(gained, gained + lost).pvalue)


def test_means_over_seeds_average_the_scores_of_the_same_rows():
    random = numpy.random.default_rng(3)
    seeds = random.integers(1, 9, size=(3, 2, 50, 18)).astype(float)
    each = [across_models.scores("ab", one, text_metrics.corpus_chrf) for one in seeds]
    mean = across_models.mean_over_repeats(each)
    assert mean.values == pytest.approx(numpy.mean([one.values for one in each], axis=0))
    drawn = []
    for draw in random.integers(50, size=(DRAWS, 50)):
        scores = text_metrics.corpus_chrf(seeds[:, :, draw].sum(axis=2)).mean(axis=0)
        drawn.append(scores[0] - scores[1])
    low, high = numpy.quantile(drawn, [0.025, 0.975])
    assert mean.contrast({"a": 1, "b": -1})["interval"] == pytest.approx([low, high], abs=0.1 * (high - low))


def test_a_corpus_score_of_a_single_row_has_no_interval():
    one = across_models.scores("ab", numpy.ones((2, 1, 18)), text_metrics.corpus_chrf)
    assert one.contrast({"a": 1, "b": -1})["interval"] is None


def test_the_margin_between_two_candidates_by_a_corpus_score_has_an_interval(study):
    entries = [{"evaluation": folder, "given": {}} for folder in folders(study)[1:]]
    for entry in entries:
        held = metrics.found_in(records.read(entry["evaluation"] / "evaluation_results.json"))
        entry["measured"] = {metric.key: metric for metric in held}
    low, high = margins.of(*entries, "bleu4.captions")["interval"]
    assert low == pytest.approx(compared(study)["bleu4"]["captions"]["change"]["interval"][0])
    assert high == pytest.approx(compared(study)["bleu4"]["captions"]["change"]["interval"][1])


def test_refuses_answers_to_other_rows(study):
    with pytest.raises(stored_samples.NotPaired, match="different items"):
        list(pairing.values(metrics.named("bleu4.captions"), [folders(study)[0], renamed(study)], "remedy"))


def renamed(study):
    """Return a copy of an evaluation whose rows are others."""
    from coppice.core import fingerprints

    folder = folders(study)[1].parent / "renamed"
    (folder / "samples").mkdir(parents=True)
    rows = table(study, PRUNED, "captions").assign(doc_hash="other")
    rows.to_parquet(folder / "samples/captions.parquet", index=False)
    digest = fingerprints.content_digest(folder / "samples/captions.parquet")
    records.write(folder / "evaluation_results.json", {"samples": {"captions": digest}})
    return folder


def test_arms_with_several_seeds_are_compared_by_a_corpus_score(study):
    dense, pruned, tuned = folders(study)
    found = pairing.means(metrics.named("bleu4.captions"), ("arm", "other"), [[tuned, pruned], [dense, pruned]], "")
    part = compared(study)["bleu4"]["captions"]
    assert found.values == pytest.approx([(part[TUNED] + part[DENSE]) / 2, part[PRUNED]])
    difference = found.contrast({"arm": 1, "other": -1})
    assert difference["p"] < 0.001 and difference["interval"][0] > 0
