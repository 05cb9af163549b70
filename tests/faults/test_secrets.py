"""Secrets in the environment reach no log, record, status file or message; text that only looks like one is kept."""

import json
import logging
import subprocess
import sys

import pytest

from coppice.core import logs, records
from coppice.core.errors import CoppiceError
from coppice.core.secrets import HIDDEN, redacted

SECRET = "correct-horse-battery-staple"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("HF_TOKEN", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_APIKEY", "GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID", "PGPASSWORD", "MLFLOW_TRACKING_PASSWORD", "my_secret", "SLURM_JWT", "SSH_PRIVATE_KEY",
        "DEPLOY_KEY", "GITHUB_PAT", "MYSQL_PWD", "DB_CREDENTIAL", "AZURE_CREDENTIALS", "HF_TOKEN_WRITE",
    ],
)  # fmt: skip
def test_hides_the_value_of_a_variable_named_like_a_secret(monkeypatch, name):
    monkeypatch.setenv(name, SECRET)
    assert redacted(f"401 for {SECRET}!") == f"401 for {HIDDEN}!"
    assert redacted({"a": [SECRET, 1, None], SECRET: f"x{SECRET}y"}) == {"a": [HIDDEN, 1, None], HIDDEN: f"x{HIDDEN}y"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "false-or-true"),
        ("HF_TOKEN_PATH", "/home/me/.cache/token"),
        ("GOOGLE_APPLICATION_CREDENTIALS", sys.executable),
        ("DB_PASSWORD", "research"),
        ("OLDPWD", "/home/me/Study-1"),
        ("SSH_AUTH_SOCK", "/tmp/ssh-agent-1"),
        ("MONKEY", "a long enough word"),
        ("X_TOKEN", "short"),
        ("Y_API_KEY", ""),
    ],
)
def test_keeps_values_that_are_not_secret(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    text = f"word {value} word"
    assert redacted(text) == text


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "aB3" * 12,
        "hf_" + "aBcDeFgHiJkLmNoPq" * 2,
        "ghp_" + "aB1" * 12,
        "github_pat_" + "aB1_" * 12,
        "sk-proj-" + "aB3-" * 10,
        "AKIA" + "A1B2" * 4,
        "me:pass-word",
        "x0abcdefgh@",
    ],
)
def test_recognizes_tokens_by_their_shape(secret):
    text = f"https://{secret.strip('@')}@host/x" if set(":@") & set(secret) else f"asked with {secret}, refused"
    assert secret not in redacted(text) and HIDDEN in redacted(text)


def test_hides_a_bearer_header_but_not_plain_words():
    assert "abcdefgh12345678" not in redacted("Authorization: Bearer abcdefgh12345678")
    for plain in ("hf_hub_download", "sk-learn", "a 40-character sha " + "0a" * 20, "https://host:8080/x@y", "hf_xet"):
        assert redacted(plain) == plain


@pytest.mark.parametrize(
    "plain",
    [
        "models/sk-pruned-llama-2024-width-and-depth/config.json",
        "hf_LlamaForCausalLMPruned",
        "Bearer transparently given",
        "ssh://git@github.com/org/name",
    ],
)
def test_keeps_names_that_begin_like_tokens(plain):
    assert redacted(plain) == plain


def test_hides_a_password_of_letters_only(monkeypatch):
    monkeypatch.setenv("MAIL_PASSWORD", "qwzhtxkvbnmplsdf")
    assert redacted("as qwzhtxkvbnmplsdf") == f"as {HIDDEN}"


def test_keeps_paths_if_a_password_is_part_of_the_working_folder(monkeypatch, tmp_path):
    (tmp_path / "Study-2024").mkdir()
    monkeypatch.chdir(tmp_path / "Study-2024")
    monkeypatch.setenv("DB_PASSWORD", "Study-2024")
    assert redacted(f"{tmp_path}/Study-2024/model") == f"{tmp_path}/Study-2024/model"


@pytest.mark.parametrize("key", ["path", "source_path", "repository"])
def test_rejects_a_path_or_repository_that_contains_a_secret(monkeypatch, tmp_path, key):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with pytest.raises(records.RecordError, match=rf"sources\.0\.{key} .*secret") as raised:
        records.write(tmp_path / "a.json", {"sources": [{key: f"data/{SECRET}"}]})
    assert SECRET not in str(raised.value) and not (tmp_path / "a.json").exists()


def test_hides_a_multiline_key_in_a_message(monkeypatch):
    key = "-----BEGIN KEY-----\nabc\ndef\n-----END KEY-----"
    monkeypatch.setenv("SSH_PRIVATE_KEY", key)
    assert str(CoppiceError(f"x: refused {key} there")) == f"x: refused {HIDDEN} there"


def test_hides_a_percent_encoded_token_in_a_url(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "a/b+c=d&e f#g")
    assert redacted("https://host/?t=a%2Fb%2Bc%3Dd%26e%20f%23g") == f"https://host/?t={HIDDEN}"


def test_hides_a_secret_in_a_record_and_keeps_the_rest(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    records.write(tmp_path / "a.json", {"settings": {"note": f"with {SECRET}", "n": [1, 2.5, None, True]}})
    assert SECRET not in (tmp_path / "a.json").read_text()
    assert records.read(tmp_path / "a.json")["settings"] == {"note": f"with {HIDDEN}", "n": [1, 2.5, None, True]}


def test_hides_a_secret_in_a_message(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert (
        str(CoppiceError(f"x: cannot be fetched: 401 for token {SECRET}"))
        == f"x: cannot be fetched: 401 for token {HIDDEN}"
    )


def test_hides_secrets_in_the_tracebacks_of_a_log(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    handlers = list(logging.getLogger().handlers)
    try:
        logs.start_logging(tmp_path / "job.log")
        try:
            raise ValueError(f"refused: {SECRET}")
        except ValueError:
            logging.getLogger("coppice").exception("with %s", SECRET)
    finally:
        for handler in logging.getLogger().handlers:
            handler.close()
        logging.getLogger().handlers[:] = handlers
    text = (tmp_path / "job.log").read_text() + capsys.readouterr().err
    assert SECRET not in text and f"refused: {HIDDEN}" in text


JOB = """
import logging, sys, warnings
from coppice.core import logs
from coppice.core.errors import CoppiceError
with logs.job("job.log", 1, "status.json", "finetune A c"):
    secret = {secret!r}
    print("a library's words", secret, file=sys.stderr)
    sys.stderr.writelines(["several lines ", secret])
    sys.stderr.buffer.write(b"bytes " + secret.encode())
    sys.stderr.flush()
    warnings.warn(secret)
    logging.getLogger("a.library").error("with %s", secret)
    try:
        raise OSError("inner " + secret)
    except OSError as error:
        raise {kind}("outer " + secret) from error
"""


@pytest.mark.parametrize("kind", ["CoppiceError", "ValueError"])
def test_a_failing_job_writes_the_token_in_its_error_nowhere(monkeypatch, tmp_path, kind):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    code = JOB.format(secret=SECRET, kind=kind)
    # A traceback quotes the source of the program, which must not contain the secret itself.
    code = code.replace(repr(SECRET), "__import__('os').environ['HF_TOKEN']")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    log, status = (tmp_path / "job.log").read_text(), json.loads((tmp_path / "status.json").read_text())
    for text in (log, json.dumps(status), done.stdout, done.stderr):
        assert SECRET not in text
    assert f"outer {HIDDEN}" in log and f"outer {HIDDEN}" in status["reason"] and "a library's words" in log
    assert f"several lines {HIDDEN}" in log and f"bytes {HIDDEN}" in log
