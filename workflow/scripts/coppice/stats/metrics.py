"""The metrics of evaluations as data: name, unit, direction, place in the records, and how two models are paired.

Selection, comparison, reports and ablations loop over metrics and name none of them. To add a metric, add an entry to
`METRICS` and an evaluator that writes the metric's value to the entry's section of evaluation_results.json, and one
value for each row to the samples. `coppice.stats.pairing` pairs these values. This module imports nothing slow, because
parsing a configuration needs it.
"""

from collections.abc import Iterable
from dataclasses import replace

from coppice.core.aliases import Record

from .metric_types import CORPUS, WEIGHTED, WINDOWS, Metric

AVERAGE = Metric(
    key="average_acc",
    section="average_acc",
    label="mean zero-shot accuracy",
    phrase="mean accuracy",
    kind="accuracy",
    column="acc %",
    unit="%",
    scale=100,
    digits=1,
    low=0,
    high=1,
    alias="acc",
    mean_of="zero_shot",
    answers=True,
    setting=("zero_shot", "tasks"),
)
TASK = Metric(
    key="{}",
    section="zero_shot",
    label="task {}",
    phrase="{}",
    kind="zero-shot accuracy",
    dataset="task",
    unit="%",
    scale=100,
    digits=1,
    low=0,
    high=1,
    right_or_wrong=True,
    reported=False,
    setting=("zero_shot", "tasks"),
    facts=("metric", "n"),
    alike=("metric", "version", "num_fewshot", "chat_template"),
)
PERPLEXITY = Metric(
    key="ppl.{}",
    section="perplexity",
    label="perplexity on {}",
    kind="perplexity",
    dataset="text",
    column="ppl",
    higher_is_better=False,
    log=True,
    low=1,
    alias="ppl",
    pairing=WINDOWS,
    setting=("perplexity", "datasets"),
    facts=("protocol", "tokens", "windows"),
    alike=("protocol",),
)
# Metrics of answers that a model writes to the rows of a data set; see `coppice.stats.text_metrics`
_ANSWERS = Metric(
    key="{}",
    section="",
    label="",
    kind="",
    scale=100,
    digits=1,
    low=0,
    high=1,
    setting=("answers", "datasets"),
    facts=("n",),
    alike=("normalization", "signature", "decoding"),
)


def _of_answers(section: str, kind: str, column: str, unit: str = "%") -> Metric:
    """Return a metric of answers, whose section, key and column in the samples have one name."""
    names = {"section": section, "values": section, "key": f"{section}.{{}}", "label": f"{kind} on {{}}"}
    return replace(_ANSWERS, **names, kind=kind, column=column, unit=unit)


ANSWER_PERPLEXITY = Metric(
    key="answer_ppl.{}",
    section="answer_ppl",
    label="perplexity of answers to {}",
    kind="perplexity of answers",
    column="answer ppl",
    higher_is_better=False,
    log=True,
    low=1,
    pairing=WEIGHTED,
    values="answer_nll",
    counts="answer_tokens",
    setting=("answers", "datasets"),
    facts=("tokens", "n"),
)
PASS_AT_1 = replace(_of_answers("pass_at_1", "pass@1", "pass@1 %"), answers=True)
ANSWERS = (
    PASS_AT_1,
    replace(_of_answers("bleu4", "BLEU-4", "BLEU-4", "x100"), pairing=CORPUS, answers=True),
    replace(_of_answers("cider", "CIDEr", "CIDEr", "x100"), high=10),
    replace(_of_answers("chrf", "chrF", "chrF", "x100"), pairing=CORPUS),
    replace(_of_answers("exact_match", "exact match", "exact %"), right_or_wrong=True, answers=True),
    _of_answers("edit_similarity", "edit similarity", "edit %"),
    _of_answers("anls", "ANLS", "ANLS %"),
    _of_answers("token_f1", "token F1", "F1 %"),
)
# Metrics of pictures and texts that find each other, and of pictures that find their class
_FOUND = replace(_ANSWERS, unit="%", right_or_wrong=True, facts=("n", "candidates", "chance"), alike=("candidates",))


def _recall(direction: str, depth: int) -> Metric:
    """Return recall among the first `depth` in a direction, such as image_to_text. Reports detail that beyond 1."""
    section, words = f"{direction}_r{depth}", direction.replace("_", " ")
    return replace(
        _FOUND,
        key=f"{section}.{{}}",
        section=section,
        label=f"{words} recall@{depth} on {{}}",
        kind=f"{words} recall@{depth}",
        column=f"{direction[0]}2{direction.split('_')[-1][0]} R@{depth}",
        samples=f"{{}}.{direction}",
        values="rank",
        depth=depth,
        reported=depth == 1,
        answers=depth == 1,
        setting=("retrieval", "datasets"),
    )


def _top(depth: int) -> Metric:
    """Return the accuracy of zero-shot classification that counts the first `depth` classes."""
    section = f"top{depth}"
    return replace(
        _FOUND,
        key=f"{section}.{{}}",
        section=section,
        label=f"top-{depth} accuracy on {{}}",
        kind=f"top-{depth} accuracy",
        column=f"top-{depth} %",
        values=section,
        reported=depth == 1,
        answers=depth == 1,
        setting=("classification", "datasets"),
        alike=("candidates", "templates"),
    )


DIRECTIONS = ("image_to_text", "text_to_image")
RETRIEVAL = tuple(_recall(direction, depth) for direction in DIRECTIONS for depth in (1, 5, 10))
CLASSIFICATION = (_top(1), _top(5))
# Metrics of the user's own data sets lead reports, before those of tasks and texts; a mean precedes its parts
OF_DATA = (*ANSWERS, ANSWER_PERPLEXITY, *RETRIEVAL, *CLASSIFICATION)
METRICS = (*OF_DATA, AVERAGE, TASK, PERPLEXITY)
# Of a training, not of an evaluation: ablations rank arms by it, over the examples that each seed holds out
LOSS = Metric(
    key="validation_loss",
    section="validation_loss",
    label="validation loss",
    kind="loss",
    digits=4,
    higher_is_better=False,
    pairing=None,
)


def held_by(record: Record) -> list[Metric]:
    """Return the entries of `METRICS` whose sections a record holds.

    Metrics of answers are in the record's order, which is that of the settings: the first of them leads reports. Only
    pass@1, which has to be asked for, comes before them.
    """
    found = [entry for entry in METRICS if entry.section in record]
    own = [entry for entry in found if entry in ANSWERS and entry != PASS_AT_1]
    ordered = iter(sorted(own, key=lambda entry: list(record).index(entry.section)))
    return [next(ordered) if entry in own else entry for entry in found]


def in_detail(entries: Iterable[Metric]) -> list[Metric]:
    """Return entries in the order of comparisons: the parts of a mean come after all others, and then the mean."""
    entries = list(entries)
    means = {entry.mean_of for entry in entries}
    return sorted(entries, key=lambda entry: 2 if entry.mean_of else int(entry.section in means))


def found_in(record: Record, entries: Iterable[Metric] | None = None) -> list[Metric]:
    """Return the metrics whose values an evaluation or comparison record holds, of `entries` (all that it holds)."""
    found = []
    for entry in held_by(record) if entries is None else entries:
        names = tuple(record.get(entry.mean_of or entry.section) or ())
        if not entry.mean_of:
            found += [entry.on(name) for name in names]
        elif record.get(entry.section) is not None:
            found.append(entry.on(*names))
    return found


def details_in(record: Record) -> list[Metric]:
    """Return the same, all of them in the order of comparisons."""
    return found_in(record, in_detail(held_by(record)))


def asked_in(evaluate: object) -> list[Metric]:
    """Return the metrics of an evaluation by the section `evaluate`: those that reports show, then the details."""
    found = []
    for entry in sorted((one for one in METRICS if one.setting), key=lambda one: not one.reported):
        section, key = entry.setting
        asked = getattr(evaluate, section)
        names = getattr(asked, key) if _is_asked(entry, asked) else []
        found += [entry.on(*names)] * bool(names) if entry.mean_of else [entry.on(name) for name in names]
    return found


def _is_asked(entry: Metric, asked: object) -> bool:
    """Return whether the section that lists the data sets of a metric asks for it."""
    if entry == PASS_AT_1:
        return asked.programs.run
    chosen = getattr(asked, "metrics", None)
    return chosen is None or entry == ANSWER_PERPLEXITY or entry.section in chosen


def parts_of(metric: Metric) -> list[Metric]:
    """Return the metrics that `metric` is the mean of; of any other metric, return the metric itself."""
    if not metric.mean_of:
        return [metric]
    return [entry.on(name) for entry in METRICS if entry.section == metric.mean_of for name in metric.names]


def named(key: str) -> Metric:
    """Return the metric of a key or of a column of the user's table; any unknown name is taken for a task.

    The column `acc` is the mean accuracy. The column `ppl` is a metric of its own, the perplexity on an unnamed text.
    """
    for entry in (*METRICS, LOSS):
        before, per_dataset, _ = entry.key.partition("{}")
        if key == entry.key or (key == entry.alias and not per_dataset):
            return entry
        if key == entry.alias:
            return replace(entry.on(key), key=key)
        if per_dataset and before and key.startswith(before):
            return entry.on(key.removeprefix(before))
    return TASK.on(key)


def axes(found: Iterable[Metric]) -> tuple[Metric, Metric]:
    """Return the two metrics of a trade-off: the one that answers the study's questions, and another one.

    The first that can answer questions does. The other one is the first of the other direction, such as perplexity
    beside accuracy, or else the first of the rest. For one that is not among `found`, return the mean accuracy or the
    perplexity, so that a message can name it.
    """
    shown = [metric for metric in found if metric.reported]
    leading = next((one for one in shown if one.answers), AVERAGE)
    rest = [one for one in shown if one != leading]
    rest.sort(key=lambda one: one.higher_is_better == leading.higher_is_better)
    return leading, rest[0] if rest else PERPLEXITY


def axes_of(columns: Iterable[str]) -> tuple[Metric, Metric]:
    """Return the same from the columns of a table of candidates, in which `ppl` counts only without a named text."""
    return axes(sorted(map(named, columns), key=lambda metric: metric.key == metric.alias))
