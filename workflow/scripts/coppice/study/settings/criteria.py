"""The criteria of `select.configs`: what each chooses by, checked against what is measured and what the table gives."""

from coppice.core.errors import SettingsError, nearest

from .candidate_sources import REQUIRED

PARAMETERS = "parameters"
ENDS = (("min", "at least"), ("max", "at most"))


def resolve(config, rows, columns):
    """name -> {metric, mode, pareto, metrics, where, words} of each criterion; `words` say it in a line.

    rows, columns: of the user's table of candidates, empty where there is none. Raises SettingsError.
    """
    known = measured(config["evaluate"])
    own = [column for column in columns if column not in REQUIRED]
    resolved = {}
    for name, full in completed(config).items():
        for metric in asked(full):
            _check_known(metric, _key(name), known, own)
            _check_column(metric, rows, name, config["candidates"]["table"], may_be_empty=metric in known)
        resolved[name] = full | {"words": _words(full)}
    return resolved


def asked(criterion):
    """The metrics that a criterion needs of each candidate; the number of parameters is always known."""
    metrics = list(criterion["metrics"] or [criterion["metric"]])
    return list(dict.fromkeys([*metrics, *(name for name in criterion["where"] if name != PARAMETERS)]))


def scored_texts(criteria, texts):
    """Those of `texts` that candidates are scored on: the ones whose perplexity a criterion asks for; all, where none
    does, since the table of candidates shows them."""
    wanted = {metric for criterion in criteria for metric in asked(criterion)}
    return [name for name in texts if f"ppl.{name}" in wanted] or list(texts)


def measured(evaluate):
    """The metrics of a candidate that is scored by the section `evaluate`."""
    tasks, texts = evaluate["zero_shot"]["tasks"], evaluate["perplexity"]["datasets"]
    return [*(["average_acc"] if tasks else []), *(f"ppl.{name}" for name in texts), *tasks]


def completed(config):
    """name -> each criterion of the configuration, with the metrics of a knee worked out. Raises SettingsError."""
    known = measured(config["evaluate"])
    return {name: _completed(one, _key(name), known) for name, one in config["select"]["configs"].items()}


def _key(name):
    return f"config key select.configs.{name}"


def _completed(criterion, key, known):
    """The criterion with the metrics of a knee worked out, and a metric of its own refused beside them."""
    if not criterion["pareto"]:
        for part in ("metric", "mode"):
            if not criterion[part]:
                raise SettingsError(f"{key}.{part} is missing; a criterion has metric and mode, or pareto: knee")
        if criterion["metrics"]:
            raise SettingsError(f"{key}.metrics: goes with pareto: knee; a single one is given as metric and mode")
        return criterion
    for part in ("metric", "mode"):
        if criterion[part]:
            raise SettingsError(f"{key}.{part}: found {criterion[part]} beside pareto; give the two metrics as metrics")
    text = next((metric for metric in known if metric.startswith("ppl.")), "ppl.wikitext2")
    metrics = criterion["metrics"] or {"average_acc": "max", text: "min"}
    if len(metrics) != 2:
        raise SettingsError(f"{key}.metrics: found {len(metrics)}; a knee is that of two metrics")
    return criterion | {"metrics": metrics}


def _check_known(metric, key, known, own):
    valid = known + own
    if metric in valid:
        return
    if metric == PARAMETERS:
        raise SettingsError(
            f"{key}: '{PARAMETERS}' is no metric to choose by, it can only be bounded (where: {{{PARAMETERS}: {{max: "
            f"3.0e+9}}}}); metrics are {', '.join(valid)}"
        )
    raise SettingsError(
        f"{key}: there is no metric '{metric}'; valid are {', '.join(valid)} (by evaluate.zero_shot.tasks, "
        f"evaluate.perplexity.datasets and the table's columns), for a bound also {PARAMETERS}"
        f"{nearest(metric, [*valid, PARAMETERS])}"
    )


def _check_column(metric, rows, name, table, may_be_empty):
    """Refuse cells that no criterion can compare; may_be_empty: what a row lacks is measured here."""
    for row in rows:
        value = row["given"].get(metric)
        if not (isinstance(value, float) or (value is None and may_be_empty)):
            raise SettingsError(
                f"{table}, row {row['row']}, column {metric}: must be a finite number, since select.configs.{name} "
                "chooses by it"
            )


def _words(criterion):
    """ "max average_acc, parameters at most 6e+09"."""
    if criterion["pareto"]:
        words = f"knee of {' and '.join(f'{name} ({mode})' for name, mode in criterion['metrics'].items())}"
    else:
        words = f"{criterion['mode']} {criterion['metric']}"
    for name, bounds in criterion["where"].items():
        parts = [f"{word} {bounds[end]:g}" for end, word in ENDS if bounds[end] is not None]
        words += f", {name} {' and '.join(parts)}"
    return words
