"""Keep secrets out of everything that is written: values of token-like variables, and tokens by their form.

All text for logs, records, status files and the terminal passes through `redacted`. The exception of a hub client, for
example, may quote the request that failed, with its authorization header.
"""

import os
import re
from collections.abc import Sequence

from .aliases import Json

HIDDEN = "[redacted]"
WORD = "[a-z]{,15}"  # a plain word; longer runs of letters are random, like the passwords that services make for apps
SHORTEST = 8  # characters of a secret; shorter values also occur in ordinary text
NAMES = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|JWT|CREDENTIALS?|_KEY|_PAT|_PWD"
    r"|(API|ACCESS|SECRET|PRIVATE|AUTH)_?KEY(_ID)?|_TOKEN_(?!PATH|FILE|DIR|URL|TYPE)\w+)$",
    re.IGNORECASE,
)
# Names of folders and classes may start like tokens. Random tokens contain both cases. Except for Hugging Face's, which
# are letters only, and GitHub's shorter ones, they also contain a digit.
SHAPES = re.compile(
    r"\b(?:hf_|gh[pousr]_)(?=[A-Z0-9]*[a-z])(?=[a-z0-9]*[A-Z])[A-Za-z0-9]{30,}"  # Hugging Face, GitHub
    r"|\b(?:github_pat_|sk-)(?=[\w-]*[a-z])(?=[\w-]*[A-Z])(?=[\w-]*\d)[\w-]{30,}"  # OpenAI's form, which many copy
    r"|\bAKIA[A-Z0-9]{16}\b"  # AWS
    r"|(?<=\b(?i:bearer) )(?=[\w.~+/-]*\d)[\w.~+/-]{16,}=*"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user and password in a URL
    r"|(?:(?<=https://)|(?<=http://))[^/\s:@]{8,}(?=@)"  # a token without a user name in a URL
)


def redacted(content: Json) -> Json:
    """Return `content` (text, or JSON-able lists and dicts of it) with every secret replaced by `HIDDEN`."""
    return _without(secrets(), content)


def secrets() -> list[str]:
    """Return the values in this process's environment that are treated as secrets, longest first."""
    found = {value for name, value in os.environ.items() if NAMES.search(name) and _may_be_secret(value.strip())}
    if not found:
        return []
    from urllib.parse import quote

    found |= {value.strip() for value in found}
    # URLs contain secrets percent-encoded. The longest come first, since a secret may contain another one.
    return sorted(found | {quote(value, safe="") for value in found}, key=len, reverse=True)


def _may_be_secret(value: str) -> bool:
    """Return whether to hide `value` everywhere: it is not a plain word, an existing file or a part of our paths."""
    if len(value) < SHORTEST or re.fullmatch(WORD, value) or (value.startswith("/") and os.path.exists(value)):
        return False
    return not any(value in place for place in (os.path.expanduser("~"), _working_folder()))


def _working_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # the working folder was deleted
        return ""


def _without(values: Sequence[str], content: Json) -> Json:
    if isinstance(content, str):
        if len(content) < SHORTEST:
            return content
        for value in values:
            content = content.replace(value, HIDDEN)
        return SHAPES.sub(HIDDEN, content)
    if isinstance(content, dict):
        return {_without(values, key): _without(values, value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without(values, item) for item in content]
    return content
