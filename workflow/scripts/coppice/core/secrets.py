"""Secrets stay out of what is written: values of the environment that look like tokens, and tokens by their shape.

Whatever goes to a log, a record, a status file or the terminal passes through `redacted`: an exception of a hub client
may quote the request that failed, with its header.
"""

import os
import re

HIDDEN = "[redacted]"
WORD = "[a-z]{,15}"  # longer ones are drawn at random, as passwords for apps are
SHORTEST = 8  # characters of a value that is taken for a secret: a shorter one stands in ordinary text too
NAMES = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|JWT|CREDENTIALS?|_KEY|_PAT|_PWD"
    r"|(API|ACCESS|SECRET|PRIVATE|AUTH)_?KEY(_ID)?|_TOKEN_(?!PATH|FILE|DIR|URL|TYPE)\w+)$",
    re.IGNORECASE,
)
# Folders and classes may begin like tokens: what is drawn at random has both cases in it, and but for Hugging Face's,
# which are letters alone, and GitHub's shorter ones always a digit
SHAPES = re.compile(
    r"\b(?:hf_|gh[pousr]_)(?=[A-Z0-9]*[a-z])(?=[a-z0-9]*[A-Z])[A-Za-z0-9]{30,}"  # Hugging Face, GitHub
    r"|\b(?:github_pat_|sk-)(?=[\w-]*[a-z])(?=[\w-]*[A-Z])(?=[\w-]*\d)[\w-]{30,}"  # OpenAI's form, taken over by many
    r"|\bAKIA[A-Z0-9]{16}\b"  # AWS
    r"|(?<=\b(?i:bearer) )(?=[\w.~+/-]*\d)[\w.~+/-]{16,}=*"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user and password in an address
    r"|(?:(?<=https://)|(?<=http://))[^/\s:@]{8,}(?=@)"  # a token alone
)


def redacted(content):
    """`content` (text, or JSON-able lists and dicts of it) with every secret in it replaced by `HIDDEN`."""
    return _without(secrets(), content)


def secrets():
    """The values of this process's environment that are taken for secrets, the longest first."""
    found = {value for name, value in os.environ.items() if NAMES.search(name) and _may_be_secret(value.strip())}
    if not found:
        return []
    from urllib.parse import quote

    found |= {value.strip() for value in found}
    return sorted(found | {quote(value, safe="") for value in found}, key=len, reverse=True)


def _may_be_secret(value):
    """Whether to hide a value wherever it stands: no plain word, no file, nothing in the paths that are worked with."""
    if len(value) < SHORTEST or re.fullmatch(WORD, value) or (value.startswith("/") and os.path.exists(value)):
        return False
    return not any(value in place for place in (os.path.expanduser("~"), _working_folder()))


def _working_folder():
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was deleted
        return ""


def _without(known, content):
    if isinstance(content, str):
        if len(content) < SHORTEST:
            return content
        for value in known:
            content = content.replace(value, HIDDEN)
        return SHAPES.sub(HIDDEN, content)
    if isinstance(content, dict):
        return {_without(known, key): _without(known, value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without(known, item) for item in content]
    return content
