"""Store the finished parts of an evaluation: the result of each task and each text, as soon as it is computed.

A part is stored in `.parts/{key}.json` beside the results, with its samples in `{key}.parquet`. The key is a digest of
everything that decides the part's numbers: weights and adapter, tokenizer, data, definition, settings, packages, kind
of device. A killed evaluation therefore continues with what is missing, another task costs only that task, and the
result of another model, other data or another method is never reused, because its key differs.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from coppice.core import fingerprints, records
from coppice.core.aliases import PathLike, Record

Computed = tuple[Record, list[Record] | None]  # the result of a part, and its samples: one record per item

logger = logging.getLogger("coppice.evaluation")

PROTOCOL = 2  # increase it if a change of method makes finished parts obsolete


class Parts:
    """The parts of one evaluation.

    `used` collects the keys of the parts that were asked for, and `runs` what it took to compute each of them, in this
    run or an earlier one.

    Args:
        folder: folder of the parts.
        common: facts that go into every key.
    """

    def __init__(self, folder: PathLike, common: Record) -> None:
        """Keep the parts in `folder`."""
        self.folder, self.common = Path(folder), common | {"parts_protocol": PROTOCOL}
        self.used: set[str] = set()
        self.runs: list[Record] = []

    def part(self, kind: str, name: str, facts: Record, compute: Callable[[], Computed]) -> Computed:
        """Return (result, samples) of a part, from its files if they exist, else from `compute()`, and store it.

        Args:
            kind: what the part is, such as "task".
            name: which one it is, such as "piqa".
            facts: what decides its numbers, besides the common facts.
            compute: measures the part; called only if no file holds it.
        """
        identity = {"kind": kind, "name": name, "facts": facts}
        key = records.digest(self.common | identity)
        found = self._read(key)
        if found is None:
            started = time.monotonic()
            result, samples = compute()
            run = records.running() | {"seconds": round(time.monotonic() - started, 3)}
            found = self._write(key, identity | {"result": result, "run": run}, samples), samples
        content, samples = found
        self.used.add(key)
        self.runs.append(content["run"])
        return content["result"], samples

    def _write(self, key: str, content: Record, samples: list[Record] | None) -> Record:
        """Store a part and return its record, which is written last so that a part is never found half-written."""
        if samples is not None:
            import pandas

            with records.atomic(self.folder / f"{key}.parquet", "wb") as file:
                pandas.DataFrame(samples).to_parquet(file, index=False)
            content["samples_sha256"] = fingerprints.content_digest(self.folder / f"{key}.parquet")
        records.write(self.folder / f"{key}.json", content)
        return content

    def _read(self, key: str) -> Computed | None:
        """Return (record, samples) of a finished part, or None if it does not exist or is damaged."""
        path = self.folder / f"{key}.json"
        if not path.is_file():
            return None
        try:
            content = records.read(path)
        except records.RecordError as error:
            logger.warning("computing a part again, because its record is damaged: %s", error)
            return None
        if "samples_sha256" not in content:
            return content, None
        samples = self.folder / f"{key}.parquet"
        if not samples.is_file() or fingerprints.content_digest(samples) != content["samples_sha256"]:
            logger.warning("computing a part again, because %s is missing or damaged", samples)
            return None
        import pandas

        return content, pandas.read_parquet(samples).to_dict("records")

    def discard_unused(self) -> None:
        """Delete the parts that this evaluation did not use: those of other settings, weights or data."""
        for path in self.folder.glob("*"):
            if path.stem not in self.used and not path.is_dir():  # parts are files; a folder here is somebody else's
                path.unlink()

    def run(self) -> Record:
        """Return what the used parts took together: devices, most threads, summed seconds, peak bytes."""
        peaks = {}
        for run in self.runs:
            for place, size in run["peak_memory_bytes"].items():
                peaks[place] = max(size, peaks.get(place, 0))
        return {
            "device": ", ".join(dict.fromkeys(run["device"] for run in self.runs)),
            "threads": max(run["threads"] for run in self.runs),
            "seconds": round(sum(run["seconds"] for run in self.runs), 3),
            "peak_memory_bytes": peaks,
        }
