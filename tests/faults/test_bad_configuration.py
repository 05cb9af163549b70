"""Every value in a configuration or table of candidates is accepted, or rejected in one line that names its place."""

import ast
import copy
import datetime
import time
import typing
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from coppice import cli
from coppice.core.errors import LONGEST, CoppiceError
from coppice.study import settings
from coppice.study.settings import config_files, keys
from coppice.study.settings.sections.finetune import Tracker

MODEL = {"models": {"Llama": {"base": "miniature/llama"}}}
# section -> the name that replaces <name> in the path of a key
NAMES = {"models": "Llama", "datasets": "ptb", "select": "best_acc", "evaluate": "piqa", "finetune": "alpaca"}
VALUES = {
    "a word": "x",
    "an empty word": "",
    "a number": 3,
    "a negative number": -1,
    "zero": 0,
    "a half": 0.5,
    "a huge number": 10**40,
    "a number of 400 digits": 10**400,
    "a huge float": 1e308,
    "not a number": float("nan"),
    "infinity": float("-inf"),
    "a boolean": True,
    "null": None,
    "a list": [1],
    "an empty list": [],
    "a list of nulls": [None],
    "a list of mappings": [{}],
    "lists in lists": [[["x"]]],
    "a mapping": {"a": 1},
    "an empty mapping": {},
    "a mapping with a number for a key": {1: 2},
    "right-to-left text": "Käse\u202e",
    "emoji": "Käse 🧀",
    "escape codes": "a\x1b[31m\x07b",
    "a null byte": "a\0b",
    "a lone surrogate": "\ud800",
    "two lines": "a\nb",
    "5,000 characters": "./" + "x" * 5000,
    "100,000 characters": "x" * 100_000,
    "a path out of the folder": "../../etc/passwd",
    "an absolute path": "/etc/passwd",
    "an unknown user's home": "~nosuchuser/x",
    "braces": "{model}",
    "a command": "$(touch pwned); `touch pwned`",
    "markup": "<script>alert(1)</script>",
    "a date": datetime.date(2020, 1, 1),
    "bytes": b"\xff",
}
# kinds of values that no key accepts
NEVER = (
    "a huge number", "a number of 400 digits", "a huge float", "not a number", "infinity", "escape codes",
    "a null byte", "a lone surrogate", "right-to-left text", "100,000 characters",
    "a mapping with a number for a key", "a date", "bytes", "lists in lists",
)  # fmt: skip


def put(path, value):
    """Return a configuration with `value` at the path of a key, and the name of its top-level section."""
    config = copy.deepcopy(MODEL)
    node, keys = config, []
    for key in path:
        keys.append(NAMES.get(path[0], "x") if key == "<name>" else key.removesuffix("[]"))
        keys += [0] * key.endswith("[]")
    for key, following in pairwise(keys):
        if key == 0:
            node = node[0]
        else:
            node = node.setdefault(key, [{"method": "depth", "ratio": 0.25}] if following == 0 else {})
    node[keys[-1]] = value
    return config, keys[0]


def message_of(call):
    """Return the message of the `CoppiceError` that `call` raises, or None; it must be one printable line."""
    started = time.process_time()  # CPU time of this process: other work on the machine does not count
    try:
        call()
        return None
    except CoppiceError as error:
        message = str(error)
        assert message.isprintable() and 10 < len(message) <= LONGEST + 10, message
        return message
    finally:
        assert time.process_time() - started < 10


@pytest.mark.parametrize("kind", VALUES)
def test_accepts_any_value_at_any_key_or_names_the_key(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (key.path for key in keys.every_key()):
        config, section = put(path, copy.deepcopy(VALUES[kind]))
        message = message_of(lambda config=config: settings.load(config))
        if message is None:
            assert kind not in NEVER, path
        elif path != ("candidates", "table"):  # that message names the file
            assert section in message, (path, message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "section", [(), ("finetune",), ("evaluate", "zero_shot"), ("candidates", "calibration")], ids=str
)
@pytest.mark.parametrize("key", ["epoch", "x" * 5000, "\x1b[2J", "ein Schlüssel", "", "{}", "a\nb", 5, None], ids=ascii)
def test_rejects_an_unknown_key_of_any_form(section, key):
    config = copy.deepcopy(MODEL)
    node = config
    for part in section:
        node = node.setdefault(part, {})
    node[key] = 1
    assert message_of(lambda: settings.load(config))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("..", "cannot be part of a path"),
        ("../x", "cannot be part of a path"),
        ("/etc", "cannot be part of a path"),
        ("a/b", "cannot be part of a path"),
        ("-rf", "cannot be part of a path"),
        (".hidden", "cannot be part of a path"),
        ("a b", "cannot be part of a path"),
        ("$(x)", "cannot be part of a path"),
        ("<b>", "cannot be part of a path"),
        ("é", "cannot be part of a path"),
        ("seed-best", "is reserved"),
        ("checkpoint-4", "is reserved"),
        ("best_acc_finetuned", "is reserved"),
        ("a\x1b[31m", "U+001B"),
        ("x" * 101, "more than 100"),
        ("released.json", "is reserved"),
        ("figures", "is reserved"),
    ],
)
@pytest.mark.parametrize("section", ["models", "configs", "datasets", "protocols", "candidates"])
def test_rejects_a_name_that_cannot_be_a_folder(section, name, words):
    text = {"path": "miniature/ptb"}
    config = {
        "models": {"models": {name: {"base": "miniature/llama"}}},
        "configs": {"select": {"configs": {name: {"metric": "piqa", "mode": "max"}}}},
        "datasets": {"datasets": {name: text}},
        "protocols": {"evaluate": {"perplexity": {"protocols": {name: {"seq_len": 8}}}}},
        "candidates": {"candidates": {"prune": [{"method": "depth", "ratio": 0.5, "name": name}]}},
    }[section]
    assert words in message_of(lambda: settings.load({**copy.deepcopy(MODEL), **config}))


@pytest.mark.parametrize("task", ["..", "a/b", "-x", "x\x1b[1m", "y" * 101])
def test_rejects_a_task_that_cannot_be_a_folder(task):
    assert message_of(lambda: settings.load(MODEL | {"evaluate": {"zero_shot": {"tasks": [task]}}}))


@pytest.mark.parametrize("key", ["results", "resources"])
def test_accepts_only_output_folders_that_can_be_made(tmp_path, key):
    (tmp_path / "file").write_text("")
    for text in ("file", "file/below", "a{b}", "~nosuchuser/x", "x" * 300, "a\nb"):
        assert f"config key {key}" in message_of(lambda text=text: settings.load(MODEL | {key: text}, workdir=tmp_path))
    for text in ("mein Ordner \"ü\" 'x' $(touch pwned)", "/somewhere/else", "../beside"):
        assert settings.load(MODEL | {key: text}, workdir=tmp_path).config.model_dump()[key] == text
    assert settings.load(MODEL | {key: "./a//b/"}, workdir=tmp_path).config.model_dump()[key] == "a/b"
    assert settings.load(MODEL | {key: "~/study"}, workdir=tmp_path).config.model_dump()[key].startswith("/")


@pytest.mark.parametrize(("task", "metric"), [("piqa", "acc_nrom"), ("arc_challenge", "f1"), ("sciq", "exact_match")])
def test_rejects_a_metric_that_the_task_lacks_before_any_job(task, metric):
    tasks = {"tasks": [task], "metric": {task: metric}}
    message = message_of(lambda: settings.load(MODEL | {"evaluate": {"zero_shot": tasks}}))
    assert f"zero_shot.metric.{task}" in message and "(it has acc, acc_norm)" in message


def test_accepts_the_trackers_of_transformers():
    source = Path(find_spec("transformers").origin).parent / "integrations" / "integration_utils.py"
    assigned = [node for node in ast.parse(source.read_text()).body if isinstance(node, ast.Assign)]
    (theirs,) = [node.value for node in assigned if ast.unparse(node.targets[0]) == "INTEGRATION_TO_CALLBACK"]
    ours = typing.get_args(Tracker)
    assert set(ours) == {key.value for key in theirs.keys}
    assert "did you mean 'wandb'" in message_of(lambda: settings.load(MODEL | {"finetune": {"report_to": ["wandbb"]}}))


FILES = {
    "a bare value": b"5",
    "a list": b"- a\n- b\n",
    "truncated": b"models: {Llama: {base: mini",
    "garbled": b"\xd0\xcf\x11\xe0" * 50,
    "null bytes": b"\0" * 64,
    "UTF-16": "seed: 1".encode("utf-16"),
    "a tab": b"models:\n\tLlama: x\n",
    "two documents": b"seed: 1\n---\nseed: 2\n",
    "a duplicate key": b"seed: 1\nseed: 2\n",
    "a list for a key": b"? [1, 2]\n: 3\n",
    "an invalid date": b"seed: 2020-13-45\n",
    "a number of 5,000 digits": b"seed: " + b"9" * 5000,
    "a Python object": b"seed: !!python/object/apply:os.system ['touch pwned']\n",
    "100,000 brackets": b"[" * 100_000,
    "unclosed braces": b'{"a":' * 100_000,
    "an alias of itself": b"models: &m {x: *m}\n",
    "nested aliases": b"a: &a [1,1,1,1,1,1,1,1,1,1]\n"
    + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 10)) for i in range(9)),
}


@pytest.mark.parametrize("kind", FILES)
def test_names_an_invalid_configuration_file(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_bytes(FILES[kind])
    assert "study.yaml" in message_of(lambda: config_files.read("study.yaml"))
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


def test_names_a_configuration_file_that_is_a_folder_or_missing(tmp_path):
    for path in (tmp_path, tmp_path / "missing.yaml"):
        assert path.name in message_of(lambda path=path: config_files.read(path))


@given(st.binary(max_size=300) | st.text(st.sampled_from("ab: -\n\t{}[]&*!|>#%@`'\"0,?~"), max_size=60).map(str.encode))
@example(b"? \n")
def test_accepts_or_rejects_any_bytes_as_a_configuration_file(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    message_of(lambda: settings.load(config_files.read(path)))


HEADER = b"model,candidate,path,acc,ppl\n"
TABLES = {
    "empty": b"",
    "garbled": b"\xd0\xcf\x11\xe0" * 50,
    "null bytes": b"\0" * 64,
    "UTF-16": "model,candidate,path\n".encode("utf-16"),
    "a cell of 200,000 characters": HEADER + b"Llama,x," + b"y" * 200_000 + b",,\n",
    "an unclosed quote": HEADER + b'Llama,"x,c,,\n',
    "truncated in a row": HEADER + b"Llama,x,c,0.5,12\nLlama,y",
    "a null byte in a cell": HEADER + b"Llama,x,c\0,,\n",
    "escape codes in a name": HEADER + b"Llama,\x1b[31mx,c,,\n",
    "escape codes in a column's name": b"model,candidate,path,a\x1b[31m\nLlama,x,c,\n",
    "escape codes in a value": b"model,candidate,path,note\nLlama,x,c,\x1b[2J\n",
    "a column without a name": b"model,candidate,path,\nLlama,x,c,5\n",
    "a path out of the folder": HEADER + b"Llama,..,c,,\n",
    "a reserved name": HEADER + b"Llama,released.json,c,,\n",
    "a name of 300 characters": HEADER + b"Llama," + b"x" * 300 + b",c,,\n",
    "a number of 400 digits": HEADER + b"Llama,x,c,," + b"9" * 400 + b"\n",
    "a number with a comma": HEADER.replace(b",", b"\t") + b"Llama\tx\tc\t0,61\t\n",
    "an unknown user's home": HEADER + b"Llama,x,~nosuchuser,,\n",
    "a pickle": HEADER + b"Llama,x,model.bin,,\n",
}


def load_table(folder):
    return settings.load(MODEL | {"candidates": {"table": "mine.csv"}}, workdir=folder)


@pytest.fixture
def folder_with_checkpoint(tmp_path):
    """Return a folder that holds a user's checkpoint folder `c` for a table to name."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("kind", TABLES)
def test_names_an_invalid_table(folder_with_checkpoint, kind):
    (folder_with_checkpoint / "mine.csv").write_bytes(TABLES[kind])
    assert "mine.csv" in message_of(lambda: load_table(folder_with_checkpoint))


def test_names_a_table_that_is_a_folder(folder_with_checkpoint):
    (folder_with_checkpoint / "mine.csv").mkdir()
    assert "mine.csv" in message_of(lambda: load_table(folder_with_checkpoint))


CELLS = ("model", "candidate", "path", "acc", "ppl", "note")
SANE = dict(zip(CELLS, ("Llama", "x", "c", "0.5", "12", "y"), strict=True))


@pytest.mark.parametrize("column", CELLS)
@pytest.mark.parametrize(
    "kind", [kind for kind, value in VALUES.items() if isinstance(value, str | float | int | None)]
)
def test_accepts_any_value_in_any_column_or_names_the_table(folder_with_checkpoint, column, kind):
    import csv

    with open(folder_with_checkpoint / "mine.csv", "w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        value = VALUES[kind]
        cell = "9" * 400 if kind == "a number of 400 digits" else "" if value is None else str(value)
        csv.writer(file).writerows([CELLS, (SANE | {column: cell}).values()])
    message = message_of(lambda: load_table(folder_with_checkpoint))
    assert message is None or "mine.csv" in message


@given(
    st.binary(max_size=200) | st.text(st.sampled_from('Lmc,x."\n\r\t0'), max_size=60).map(lambda t: HEADER + t.encode())
)
def test_accepts_or_rejects_any_bytes_as_a_table(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / "mine.csv").write_bytes(content)
    message_of(lambda: load_table(folder))


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf", "fast"])
def test_plan_rejects_an_invalid_rate(capsys, rate):
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", f"--tflops={rate}"])
    assert ended.value.code == 2 and "--tflops" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["show", "file"], ["show", "nowhere"], ["report", "file"], ["plan", "--configfile", "."]]
)
def test_the_command_line_rejects_unreadable_input_in_one_line(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"\0")
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
