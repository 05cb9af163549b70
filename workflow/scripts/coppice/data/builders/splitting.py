"""Divide rows by group into the roles train, selection and report, and write the files of the roles.

A group, such as the rows of one file or one image, is never on two sides. Which groups go where depends on the seed and
the names of the groups alone, not on the order of rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coppice.core import fingerprints, records
from coppice.core.aliases import PathLike, Record
from coppice.core.errors import DataError, SettingsError

from ..datasets import ROLES

RATIOS = (0.9, 0.05, 0.05)


@dataclass(frozen=True)
class Target:
    """Where the rows of a data set go.

    Attributes:
        output: file of the training rows. Those of another role go beside it, to `<name>.<role>.jsonl`.
        ratios: shares of train, selection and report; one that is left out is 0. A single 1 writes one file.
        seed: decides which groups go where, and every other choice.
        force: whether files that exist are replaced.
    """

    output: PathLike
    ratios: Sequence[float] = RATIOS
    seed: int = 42
    force: bool = False
    shares: dict[str, float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Raise SettingsError for ratios that are no shares of one whole."""
        ratios = [float(ratio) for ratio in self.ratios]
        if not 1 <= len(ratios) <= len(ROLES) or min(ratios) < 0 or not ratios[0] or abs(sum(ratios) - 1) > 1e-6:
            raise SettingsError(
                f"ratios: {', '.join(f'{ratio:g}' for ratio in ratios)} are no shares of train, selection and report. "
                "Give one to three numbers that add up to 1, the first above 0, such as 0.9 0.05 0.05."
            )
        shares = {role: ratio for role, ratio in zip(ROLES, ratios, strict=False) if ratio}
        object.__setattr__(self, "shares", shares)

    def file_of(self, role: str) -> Path:
        """Return the file of a role's rows."""
        return Path(self.output) if role == "train" else self._beside(f"{role}{Path(self.output).suffix}")

    @property
    def report(self) -> Path:
        """The file that says how the data set was made."""
        return self._beside("build.json")

    def _beside(self, ending: str) -> Path:
        output = Path(self.output)
        stem = output.stem.removesuffix(".train").removesuffix("_train")
        return output.with_name(f"{stem}.{ending}")

    def check_free(self) -> None:
        """Raise SettingsError if a file would be replaced and `force` is False, or rows would have no place."""
        output = Path(self.output)
        if output.suffix != ".jsonl":
            raise SettingsError(f"{output}: the output is in JSON lines. Name a file that ends with .jsonl.")
        files = [*(self.file_of(role) for role in self.shares), self.report]
        existing = [str(file) for file in files if file.exists()]
        if existing and not self.force:
            raise SettingsError(f"{', '.join(existing)}: exists already. Name another output, or add --force.")

    def write(self, rows: Mapping[str, Sequence[Record]], facts: Record, clock: records.Clock) -> Record:
        """Write the rows of each role and the report; return the report.

        Args:
            rows: role -> its rows.
            facts: what the report says besides how many rows each role has.
            clock: was started before the work.

        Raises:
            DataError: a role has no rows.
        """
        written = {}
        for role in self.shares:
            if not rows.get(role):
                raise DataError(f"{self.file_of(role)}: no row is left for {role}. Give more data or other ratios.")
        for role in self.shares:
            with records.atomic(self.file_of(role)) as file:
                for row in rows[role]:
                    file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            digest = fingerprints.content_digest(self.file_of(role))
            written[role] = {"file": self.file_of(role).name, "rows": len(rows[role]), "sha256": digest}
        report = {"roles": written} | facts
        settings = {"ratios": self.shares, "seed": self.seed}
        records.write(self.report, report | {"provenance": clock.provenance(settings, self.seed)})
        return report

    def entry(self) -> str:
        """Return the entry of the section `datasets` that reads the files, as YAML in one line."""
        folder, name = Path(self.output).resolve().parent, Path(self.output).stem
        files = ", ".join(f"{role}: {self.file_of(role).name}" for role in self.shares)
        missing = ", ".join(f"{role}: null" for role in ROLES if role not in self.shares)
        splits = ", ".join(filter(None, (files, missing)))
        return f"{name.replace('.', '-')}: {{path: {folder}, format: json, splits: {{{splits}}}}}"


def roles_of(groups: Mapping[str, int], shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """Return the role of each group.

    In an order by their hashes, each group goes to the role that lacks most rows of its share. A role that gets none
    this way takes the smallest group of the role that has most.

    Args:
        groups: name of each group -> the number of its rows.
        shares: role -> its share.
        seed: another seed gives another order.

    Raises:
        DataError: there are fewer groups than roles.
    """
    if len(groups) < len(shares):
        raise DataError(
            f"{len(groups)} groups cannot be divided into {', '.join(shares)}. Divide by a smaller unit, or give fewer "
            "ratios (a single 1 writes one file)."
        )
    lacking = {role: share * sum(groups.values()) for role, share in shares.items()}
    members: dict[str, list[str]] = {role: [] for role in shares}
    for name in shuffled(groups, f"{seed}"):
        role = max(lacking, key=lacking.__getitem__)
        members[role].append(name)
        lacking[role] -= groups[name]
    for own in members.values():
        if not own:
            most = max(members.values(), key=len)
            own.append(most.pop(min(range(len(most)), key=lambda place: groups[most[place]])))
    return {name: role for role, own in members.items() for name in own}


def sampled(keys: Iterable[str], count: int | None, seed: int) -> set[str]:
    """Return `count` of the keys, chosen by their hashes; all of them if `count` is None."""
    return set(shuffled(keys, f"sample {seed}")[:count])


def shuffled(keys: Iterable[str], seed: str) -> list[str]:
    """Return the keys in an order that depends on them and the seed alone."""
    return sorted(keys, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
