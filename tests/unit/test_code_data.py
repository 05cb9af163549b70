"""Data sets of code: the files of a tree, the filters, spans, duplicates, splits and contexts, and the command."""

import ast
import json
import random
import string
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from coppice import cli
from coppice.core.errors import CoppiceError, DataError, SettingsError
from coppice.data import builders
from coppice.data.builders import code_filters, code_spans, licenses, near_duplicates, source_tree, splitting

# assembled here, so that no scanner takes this file for one with a secret
HF = "hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0dF3g"
AWS = "AKIA" + "Q3EGR5T7UJ2M4XLP"
KEY = "-----BEGIN RSA " + "PRIVATE KEY-----"
WORDS = [a + b for a in "bcdfghjklmnp" for b in ("alo", "emi", "ora", "uti", "ysa")]


def module(seed, functions=4):
    """Return a Python module of functions whose words differ with the seed."""
    generator = random.Random(seed)
    lines = []
    for _ in range(functions):
        one, two, three = generator.sample(WORDS, 3)
        lines += [f"def {one}({two}, {three}):", f'    """Return {one}."""', f"    if {two} > {three}:"]
        lines += [f"        return {two} - {generator.randint(2, 99)}", f"    total = {two} * {three}"]
        lines += [f"    return total + {generator.randint(100, 999)}", "", ""]
    return "\n".join(lines)


def tree(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).write_text(content, encoding="utf-8")
    return folder


def repository(folder, files, untracked=()):
    tree(folder, files)
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *identity, "commit", "-q", "-m", "one"], cwd=folder, check=True)
    tree(folder, dict(untracked))
    return folder


def built(tmp_path, folders, ratios=(1,), seed=42, name="out/code.jsonl", **choices):
    """Return (report, role -> rows) of a data set."""
    target = builders.Target(tmp_path / name, ratios, seed, force=True)
    report = builders.build_code_data(builders.CodeData(folders, **choices), target)
    rows = {role: list(map(json.loads, target.file_of(role).open(encoding="utf-8"))) for role in target.shares}
    return report, rows


def reasons(report):
    return {one["file"].partition("/")[2]: one["reason"] for one in report["left_out_files"]}


# The files of a tree


def paths(folder):
    return [file.path for file in source_tree.files_of([folder])]


def test_takes_the_tracked_files_of_a_repository(tmp_path):
    folder = repository(tmp_path / "repo", {"a.py": "1", "b/c.py": "2", "d.py": "3"}, {"new.py": "4"})
    (folder / "d.py").unlink()
    assert paths(folder) == ["a.py", "b/c.py"]
    assert paths(folder / "b") == ["b/c.py"]


def test_heeds_nested_gitignore_files_outside_repositories(tmp_path):
    files = {"a.py": "", "b.log": "", "keep/b.log": "", "build/x.py": "", "sub/x.py": "", "sub/y.py": ""}
    rules = {".gitignore": "*.log\nbuild/\n", "keep/.gitignore": "!b.log\n", "sub/.gitignore": "/x.py\n"}
    found = [path for path in paths(tree(tmp_path / "tree", files | rules)) if ".gitignore" not in path]
    assert found == ["a.py", "keep/b.log", "sub/y.py"]


def test_reads_a_folder_of_several_repositories(tmp_path):
    for name in ("one", "two"):
        repository(tmp_path / "all" / name, {"a.py": name}, {"untracked.py": ""})
    found = source_tree.files_of([tmp_path / "all"])
    assert [(file.repository, file.path) for file in found] == [("one", "a.py"), ("two", "a.py")]


def test_reads_a_folder_that_its_repository_ignores_if_the_user_names_it(tmp_path):
    folder = repository(tmp_path / "repo", {".gitignore": "packages/\n"}, {"packages/a.py": "1"})
    assert paths(folder / "packages") == ["a.py"]


def test_follows_no_links(tmp_path):
    outside = tree(tmp_path / "outside", {"a.py": ""})
    folder = tree(tmp_path / "tree", {"b.py": ""})
    (folder / "link.py").symlink_to(outside / "a.py")
    (folder / "folder").symlink_to(outside)
    assert paths(folder) == ["b.py"]


def test_runs_no_program_that_a_repository_names(tmp_path):
    folder = repository(tmp_path / "repo", {"a.py": "1"})
    subprocess.run(["git", "config", "core.fsmonitor", f"touch {tmp_path}/ran; false"], cwd=folder, check=True)
    assert paths(folder) == ["a.py"] and not (tmp_path / "ran").exists()


def test_rejects_two_repositories_of_one_name(tmp_path):
    for place in ("a", "b"):
        repository(tmp_path / place / "repo", {"a.py": "1"})
    with pytest.raises(DataError, match="both called repo"):
        source_tree.files_of([tmp_path / "a/repo", tmp_path / "b/repo"])


# Filters


REFUSED = {
    "notes.txt": ("words " * 20, "other file"),
    "vendor/lib.py": (module(1), "vendored"),
    "api_pb2.py": (module(2), "generated or minified"),
    "made.py": ("# Code generated by hand-written tool. DO NOT EDIT.\n" + module(3), "generated or minified"),
    "short.py": ("x = 1\n", "empty or very short"),
    "large.py": ("x = 1\n" * 200_000, "too large"),
    "latin.py": (("# caf\xe9\n" + module(4)).encode("latin-1"), "not UTF-8"),
    "nul.py": (module(5) + "\0", "not UTF-8"),
    "wide.js": ("var x=1;" * 300, "long lines"),
    "numbers.c": ("{ + - , ; } % $ # @ ! \n" * 20, "few letters and digits"),
    "chat.py": (module(6) + 'END = "<|endoftext|>"\n', "spells control tokens"),
    "fim.py": (module(6) + 'END = "<fim_middle>"\n', "spells control tokens"),
    "token.py": (module(7) + f'TOKEN = "{HF}"\n', "contains a secret"),
    "aws.py": (module(8) + f'key = "{AWS}"\n', "contains a secret"),
    "pem.py": (module(9) + f"PEM = '''{KEY}\n'''\n", "contains a secret"),
    "login.py": (module(10) + 'db_password = "hunter2000xyz"\n', "contains a secret"),
    "url.py": (module(11) + 'URL = "https://root:' + 'h4nter2x@db.internal/x"\n', "contains a secret"),
}


def test_says_of_each_file_why_it_is_left_out_and_never_shows_the_secret(tmp_path):
    files = {name: content for name, (content, _) in REFUSED.items()}
    kept = {"good.py": module(20), "also.py": module(21) + 'password = os.environ["DB_PASSWORD_1"]\n'}
    report, rows = built(tmp_path, [tree(tmp_path / "tree", files | kept)])
    assert reasons(report) == {name: reason for name, (_, reason) in REFUSED.items() if reason != "other file"}
    assert report["files"]["left_out"]["other file"] == 1
    assert {row["path"] for row in rows["train"]} == set(kept)
    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert not any(secret in written for secret in (HF, AWS, KEY, "hunter2000xyz", "h4nter2x"))
    found = {one["file"]: one["detail"] for one in report["left_out_files"]}
    assert found["tree/token.py"] == f"token, or password in a URL, line {module(7).count(chr(10)) + 1}"


@pytest.mark.parametrize(
    "line",
    [
        'password = "${DB_PASSWORD_123}"',
        'password = "your-password-123"',
        'token = get_token("section 10")',
        'key = "AKIAIOSFODNN7EXAMPLE"',
        'url = "https://user:password1@example.com"',
    ],
)
def test_takes_placeholders_for_no_secrets(line):
    assert code_filters.refused_text(module(1) + line + "\n") is None


def test_reads_a_file_with_a_byte_order_mark():
    assert code_filters.decoded(b"\xef\xbb\xbfx = 1") == "x = 1"


MIT = "Permission is hereby granted, free of charge, to any person\nobtaining a copy of this software ..."
BSD = "Redistribution and use in source and binary forms, with or without\nmodification, are permitted provided that"
GPL = "GNU GENERAL PUBLIC LICENSE\nVersion 3, 29 June 2007\n ... 13. Use with the GNU Affero General Public License."


@pytest.mark.parametrize(
    ("text", "spdx"),
    [
        (MIT, "MIT"),
        (BSD, "BSD-2-Clause"),
        (BSD + " ... Neither the name of the copyright holder nor", "BSD-3-Clause"),
        (GPL, "GPL-3.0-only"),
        ("                   GNU LESSER GENERAL PUBLIC LICENSE\n   Version 2.1, February 1999", "LGPL-2.1-only"),
        ("# Licensed under the Apache License, Version 2.0 (the 'License');", "Apache-2.0"),
        ("/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */", "GPL-2.0-only WITH Linux-syscall-note"),
        ("# Copyright 2020 by nobody", None),
    ],
)
def test_recognizes_a_license_by_its_text(text, spdx):
    assert licenses.recognized(text) == spdx


def test_an_expression_is_allowed_by_one_side_of_or_and_both_of_and():
    assert licenses.allowed("MIT OR GPL-2.0-only", ["mit"])
    assert licenses.allowed("(MIT AND Apache-2.0) OR GPL-3.0-only", ["MIT", "Apache-2.0"])
    assert not licenses.allowed("MIT AND GPL-2.0-only", ["MIT"])
    assert licenses.allowed("Apache-2.0 WITH LLVM-exception", ["Apache-2.0"])


def test_keeps_the_files_of_allowed_licenses_alone(tmp_path):
    files = {"LICENSE": MIT, "a.py": module(1), "sub/COPYING": GPL, "sub/b.py": module(2)}
    files |= {"c.py": "# SPDX-License-Identifier: EPL-2.0\n" + module(3)}
    folders = [tree(tmp_path / "tree", files), tree(tmp_path / "bare", {"d.py": module(4)})]
    report, rows = built(tmp_path, folders, licenses=["permissive"])
    assert {row["path"]: row["license"] for row in rows["train"]} == {"a.py": "MIT"}
    assert report["files"]["left_out"] == {"license": 3, "other file": 2}
    _, rows = built(tmp_path, folders, licenses=["unknown", "EPL-2.0"])
    assert {row["path"]: row["license"] for row in rows["train"]} == {"c.py": "EPL-2.0", "d.py": "unknown"}
    report, _ = built(tmp_path, folders)
    assert report["licenses"] == {"MIT": 1, "EPL-2.0": 1, "GPL-3.0-only": 1, "unknown": 1}


# Spans


@given(some.text(string.printable + "äß∂🌳\u2028", max_size=400), some.integers(1, 6))
def test_prefix_middle_and_suffix_of_any_text_are_the_text(text, count):
    for span in code_spans.spans(text, "go", count, "seed"):
        assert span.prefix + span.middle + span.suffix == text
        assert span.middle == span.middle.strip(" \t\r\n\v\f") and span.kind in ("line", "lines")


@given(some.integers(0, 1000), some.sampled_from(["\n", "\r\n", "\r"]), some.sampled_from(["", "# \f é🌳\n\f"]))
def test_spans_of_python_are_whole_statements(seed, newline, before):
    text = (before + module(seed) + f"@{WORDS[seed % 60]}\nclass A:\n    with x as y: pass\n").replace("\n", newline)
    found = code_spans.spans(text, "python", 100, "seed")
    assert {span.kind for span in found} == {"body", "block", "line"}
    for span in found:
        assert span.prefix + span.middle + span.suffix == text
        # a span can be replaced by a statement: it begins and ends where statements do
        ast.parse(span.prefix + "pass" + span.suffix)
        column = len(span.prefix) - max(span.prefix.rfind("\n"), span.prefix.rfind("\r")) - 1
        lines = span.middle.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        ast.parse("\n".join([lines[0], *(line[column:] for line in lines[1:])]).replace("return", "x ="))


def test_the_body_of_a_function_begins_after_its_docstring():
    text = 'def f(a):\n    """Say."""\n    b = a + 1\n    return b\n'
    bodies = [span for span in code_spans.spans(text, "python", 9, "") if span.kind == "body"]
    assert [span.middle for span in bodies] == ["b = a + 1\n    return b"]


def test_python_that_does_not_parse_is_cut_by_lines():
    assert {span.kind for span in code_spans.spans("print 'a'\nprint 'b'\n", "python", 9, "")} == {"line", "lines"}


# Duplicates


def test_keeps_one_of_equal_and_nearly_equal_texts():
    text = module(1, functions=20)
    near = text.replace("total", "result", 1)
    exact, close = near_duplicates.first_of_each([text, module(2), text.replace("\n", "  \n"), near])
    assert exact == {2: 0} and close == {3: 0}


def test_a_chain_of_near_copies_is_one_group():
    base = [f"word{number}" for number in range(400)]
    texts = [" ".join([*base[step * 40 :], *(f"new{number}" for number in range(step * 40))]) for step in range(5)]

    def jaccard(one, two):
        a, b = near_duplicates.shingles(one), near_duplicates.shingles(two)
        return len(a & b) / len(a | b)

    assert jaccard(texts[0], texts[1]) > 0.75 and jaccard(texts[0], texts[4]) < 0.5
    assert near_duplicates.first_of_each(texts) == ({}, {1: 0, 2: 0, 3: 0, 4: 0})


def test_no_copy_of_a_file_is_on_another_side(tmp_path):
    texts = [module(seed, functions=10) for seed in range(40)]
    files = {f"a/{number}.py": text for number, text in enumerate(texts)}
    files |= {f"b/{number}.py": text.replace("return total", "return  total", 1) for number, text in enumerate(texts)}
    report, rows = built(tmp_path, [tree(tmp_path / "tree", files)], (0.6, 0.2, 0.2))
    assert report["files"]["left_out"] == {"near copy": 40}
    assert all(row["path"].startswith("a/") for own in rows.values() for row in own)


def test_leaves_out_held_out_rows_that_repeat_a_training_row(tmp_path):
    shared = "\n".join(f"    {word}_{word} = {number}" for number, word in enumerate(WORDS[:6]))
    files = {
        f"{number}.py": f"{module(number, functions=12)}\ndef shared():\n{shared}\n    return None\n"
        for number in range(30)
    }
    report, rows = built(tmp_path, [tree(tmp_path / "tree", files)], (0.6, 0.2, 0.2), spans_per_file=1000)
    marks = [(row["prefix"].strip()[-80:], row["middle"]) for own in rows.values() for row in own]
    assert len(marks) == len(set(marks))
    assert report["left_out_rows"]["selection"] > 5


# Splits


def test_gives_each_role_its_share_of_single_rows():
    found = splitting.roles_of({str(number): 1 for number in range(5000)}, {"train": 0.9, "selection": 0.1}, 42)
    assert sum(role == "selection" for role in found.values()) == 500


@given(some.dictionaries(some.text(max_size=4), some.integers(1, 50), min_size=3, max_size=60), some.integers(0, 9))
def test_every_role_gets_a_group_and_about_its_share(groups, seed):
    shares = {"train": 0.5, "selection": 0.3, "report": 0.2}
    found = splitting.roles_of(groups, shares, seed)
    assert set(found) == set(groups) and set(found.values()) == set(shares)
    assert found == splitting.roles_of(dict(sorted(groups.items())), shares, seed)
    for role, share in shares.items():
        rows = sum(size for name, size in groups.items() if found[name] == role)
        assert abs(rows - share * sum(groups.values())) <= 2 * max(groups.values())


def test_another_seed_splits_otherwise():
    groups = {str(number): 1 for number in range(50)}
    shares = {"train": 0.5, "selection": 0.5}
    assert splitting.roles_of(groups, shares, 1) != splitting.roles_of(groups, shares, 2)


@pytest.mark.parametrize("by", ["file", "folder", "repository"])
def test_no_group_is_on_two_sides(tmp_path, by):
    folders = [
        repository(
            tmp_path / f"repo{place}",
            {f"{number % 4}/{number}.py": module(f"{place} {number}") for number in range(12)},
        )
        for place in range(4)
    ]
    _, rows = built(tmp_path, folders, (0.5, 0.25, 0.25), split_by=by)
    groups = {
        role: {(row["repo"], *row["path"].split("/")[: {"repository": 0, "folder": 1, "file": 2}[by]]) for row in own}
        for role, own in rows.items()
    }
    assert groups["train"] and groups["selection"] and groups["report"]
    assert not (groups["train"] & groups["selection"] | groups["train"] & groups["report"])
    assert not groups["selection"] & groups["report"]


def test_rejects_fewer_repositories_than_roles(tmp_path):
    folder = repository(tmp_path / "one", {f"{number}.py": module(number) for number in range(9)})
    with pytest.raises(DataError, match="1 groups cannot be divided into train, selection, report"):
        built(tmp_path, [folder], (0.8, 0.1, 0.1), split_by="repository")


def test_makes_the_same_files_again_and_a_sample_of_them(tmp_path):
    folder = tree(tmp_path / "tree", {f"{number}.py": module(number) for number in range(30)})
    first, _ = built(tmp_path, [folder], (0.8, 0.1, 0.1))
    again, _ = built(tmp_path, [folder], (0.8, 0.1, 0.1), name="again/code.jsonl")
    assert {role: own["sha256"] for role, own in first["roles"].items()} == {
        role: own["sha256"] for role, own in again["roles"].items()
    }
    other, _ = built(tmp_path, [folder], (0.8, 0.1, 0.1), seed=7)
    assert other["roles"]["train"]["sha256"] != first["roles"]["train"]["sha256"]
    _, few = built(tmp_path, [folder], (0.8, 0.1, 0.1), max_rows=50)
    assert 45 <= sum(map(len, few.values())) <= 50  # rows that repeat others are left out of the sample
    for row in (row for own in few.values() for row in own):
        assert row["prefix"] + row["middle"] + row["suffix"] == (folder / row["path"]).read_text()


def test_whole_files_are_split_as_their_spans_are(tmp_path):
    folder = tree(tmp_path / "tree", {f"{number}.py": module(number) for number in range(30)})
    _, spans = built(tmp_path, [folder], (0.8, 0.1, 0.1))
    _, files = built(tmp_path, [folder], (0.8, 0.1, 0.1), rows="files")
    for role, own in files.items():
        assert {row["path"] for row in own} == {row["path"] for row in spans[role]}
        assert all(row["text"] == (folder / row["path"]).read_text() for row in own)


# Context


def test_a_row_begins_with_the_modules_that_its_file_imports(tmp_path):
    files = {"src/pack/__init__.py": "# " + "nothing to see here " * 5 + "\n", "src/pack/near.py": module(1)}
    files |= {"src/pack/util/used.py": module(2), "src/pack/util/unused.py": module(3)}
    files |= {"src/pack/main.py": "from pack.util import used\nfrom . import near\n" + module(4)}
    _, rows = built(tmp_path, [tree(tmp_path / "tree", files)], context_characters=100_000)
    context = {row["path"]: [one["path"] for one in row["context"]] for row in rows["train"]}
    assert context["src/pack/main.py"][-1] == "src/pack/util/used.py"
    assert "src/pack/near.py" in context["src/pack/main.py"]
    assert "src/pack/util/unused.py" not in context["src/pack/main.py"]
    for one in next(row for row in rows["train"] if row["path"] == "src/pack/main.py")["context"]:
        assert one["text"] == files[one["path"]]


def test_a_training_rows_context_holds_no_held_out_file(tmp_path):
    names = [f"m{number}" for number in range(20)]
    files = {f"{name}.py": "".join(f"import {other}\n" for other in names) + module(name) for name in names}
    _, rows = built(tmp_path, [tree(tmp_path / "tree", files)], (0.5, 0.25, 0.25), context_characters=10_000)
    role_of = {row["path"]: role for role, own in rows.items() for row in own}
    for role, own in rows.items():
        for row in own:
            assert row["context"] and sum(len(one["text"]) for one in row["context"]) <= 10_000
            for one in row["context"]:
                assert one["path"] != row["path"] and role_of.get(one["path"], "train") in ("train", role)


# The command


def test_the_command_writes_files_that_a_study_reads(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    repository(tmp_path / "repo", {f"{number}.py": module(number) for number in range(30)})
    words = ["build-code-data", "--source-dir", "repo", "--output", "data/code.jsonl"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "30 files seen, 30 kept" in shown and "data/code.selection.jsonl" in shown
    import yaml

    entry = yaml.safe_load(shown.partition("datasets:\n")[2])["code"]
    assert set(entry["splits"]) == {"train", "selection", "report"}
    for file in entry["splits"].values():
        assert (Path(entry["path"]) / file).is_file()
    report = json.loads((tmp_path / "data/code.build.json").read_text())
    assert len(report["sources"][0]["commit"]) == 40
    assert cli.main(words) == 1
    assert "exists already" in capsys.readouterr().err
    assert cli.main([*words, "--force", "--ratios", "1", "--languages", "python"]) == 0


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"source_dirs": ["nowhere"]}, "nowhere: there is no such folder"),
        ({"languages": ["pyhton"]}, "did you mean 'python'"),
        ({"max_rows": 0}, "must be at least 1"),
        ({"languages": ["go"]}, "no source file is left .other language: 1"),
    ],
)
def test_rejects_wrong_choices(tmp_path, choices, message):
    folder = tree(tmp_path / "tree", {"a.py": module(1)})
    with pytest.raises(CoppiceError, match=message):
        built(tmp_path, **({"folders": choices.pop("source_dirs", [folder])} | choices))


@pytest.mark.parametrize("ratios", [(), (0.5, 0.4), (0, 1), (0.5, 0.3, 0.1, 0.1), (1.5, -0.5)])
def test_rejects_ratios_that_are_no_shares(tmp_path, ratios):
    with pytest.raises(SettingsError, match="ratios"):
        builders.Target(tmp_path / "a.jsonl", ratios)
