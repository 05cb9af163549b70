"""The finished parts of an evaluation: each task's and each text's result, stored as soon as it is there.

A part lies in `.parts/{key}.json` beside the results (with its samples in `{key}.parquet`), where the key is a digest
of all that decides its numbers: weights and adapter, tokenizer, data, definition, settings, packages, kind of device.
So an evaluation that was killed goes on with what it lacks, one more task costs that task alone, and a result of
another model, of other data or of another method can never be picked up: it has another key.
"""

import logging
import time
from pathlib import Path

from coppice.core import fingerprints, records

logger = logging.getLogger("coppice.evaluation")

PROTOCOL = 1  # to be raised with a change of method that makes finished parts obsolete


class Parts:
    """The parts in `folder` of one evaluation; `common` are the facts that every key rests on.

    `runs` collects what computing each used part took, whenever that was.
    """

    def __init__(self, folder, common):
        self.folder, self.common = Path(folder), common | {"parts_protocol": PROTOCOL}
        self.used, self.runs = set(), []

    def part(self, kind, name, facts, compute):
        """(result, samples) of the part {kind, name, facts}: from its files, or from `compute()`, which is then stored.

        result: a JSON-able dict; samples: a list of dicts, one an item, or None.
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

    def _write(self, key, content, samples):
        """Store a part; its record comes last, so that a part is there whole or not at all."""
        if samples is not None:
            import pandas

            with records.atomic(self.folder / f"{key}.parquet", "wb") as file:
                pandas.DataFrame(samples).to_parquet(file, index=False)
            content["samples_sha256"] = fingerprints.content_digest(self.folder / f"{key}.parquet")
        records.write(self.folder / f"{key}.json", content)
        return content

    def _read(self, key):
        """(record, samples) of a finished part; None where there is none, or where it is damaged."""
        path = self.folder / f"{key}.json"
        if not path.is_file():
            return None
        try:
            content = records.read(path)
        except records.RecordError as error:
            logger.warning("computed again: %s", error)
            return None
        if "samples_sha256" not in content:
            return content, None
        samples = self.folder / f"{key}.parquet"
        if not samples.is_file() or fingerprints.content_digest(samples) != content["samples_sha256"]:
            logger.warning("computed again: %s is missing or damaged", samples)
            return None
        import pandas

        return content, pandas.read_parquet(samples).to_dict("records")

    def discard_unused(self):
        """Remove the parts that this evaluation did not use: of other settings, weights or data. A folder is none."""
        for path in self.folder.glob("*"):
            if path.stem not in self.used and not path.is_dir():
                path.unlink()

    def run(self):
        """What the used parts took together: device, threads, seconds (summed), peak bytes."""
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
