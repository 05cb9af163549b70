"""The page of the documentation that lists the architectures, made from the results of their trials."""

from pathlib import Path

from . import tiny, trial

PAGE = Path(__file__).parents[2] / "docs/reference/architectures.md"
BEGIN, END = "<!-- table: begin, made by make architectures -->", "<!-- table: end -->"


def row(title: str, answers: dict[str, str]) -> str:
    """Return the line of one architecture."""
    cells = [answer.partition(": ")[0] if answer.startswith(trial.NO) else answer for answer in answers.values()]
    return f"| {title} (`{tiny.ARCHITECTURES[title][0]}`) | {' | '.join(cells)} |"


def table(results: dict[str, dict[str, str]]) -> str:
    """Return the table of all architectures, and the reasons of what does not work besides pruning."""
    head = f"| architecture | {' | '.join(trial.PARTS)} |\n|{'---|' * (len(trial.PARTS) + 1)}"
    rows = [row(title, answers) for title, answers in results.items()]
    reasons = [
        f"- {title}, {part}: {answer.partition(': ')[2]}"
        for title, answers in results.items()
        for part, answer in answers.items()
        if answer.startswith(trial.NO) and part not in trial.POINTS
    ]
    return "\n".join([head, *rows, *(["", *reasons] if reasons else [])])


def written(results: dict[str, dict[str, str]]) -> str:
    """Return the page with a new table."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{rest.partition(END)[2]}"
