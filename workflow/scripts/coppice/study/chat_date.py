"""The day that chat templates read as today: the one of the configuration, or the day on which the work began."""

import datetime
from pathlib import Path

from coppice.core import records
from coppice.core.aliases import PathLike

RECORD = "chat_date.json"


def of(configured: str | None, folder: PathLike) -> str:
    """Return the day, YYYY-MM-DD: `configured`, else the one recorded in `folder`, else today."""
    record = Path(folder) / RECORD
    if configured is None and record.exists():
        return records.read(record)["chat_date"]
    return configured or datetime.date.today().isoformat()


def keep(day: str, folder: PathLike) -> None:
    """Record the day in `folder`, so that the work goes on with it tomorrow."""
    record = Path(folder) / RECORD
    if not record.exists():
        record.parent.mkdir(parents=True, exist_ok=True)
        records.write(record, {"chat_date": day})
