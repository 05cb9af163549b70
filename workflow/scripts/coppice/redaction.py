"""Secrets stay out of what is written: values of the environment that look like tokens, and tokens by their shape.

Whatever goes to a log, a record, a status file or the terminal passes through `redacted`: an exception of a hub client
may quote the request that failed, with its header.
"""

import os
import re

HIDDEN = "[redacted]"
SHORTEST = 8  # characters of a value that is taken for a secret: a shorter one stands in ordinary text too
NAMES = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|JWT|(API|ACCESS|SECRET|PRIVATE|AUTH)_?KEY(_ID)?)$", re.IGNORECASE
)
SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"  # GitHub
    r"|\bsk-[A-Za-z0-9_-]{20,}"  # OpenAI and those who took over its form
    r"|\bAKIA[A-Z0-9]{16}\b"  # AWS
    r"|(?<=\bbearer )[\w.~+/-]{8,}=*"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)",  # user and password in an address
    re.IGNORECASE,
)


def redacted(content):
    """`content` (text, or JSON-able lists and dicts of it) with every secret in it replaced by `HIDDEN`."""
    return _without(secrets(), content)


def secrets():
    """The values of this process's environment that are taken for secrets, the longest first."""
    found = {value for name, value in os.environ.items() if NAMES.search(name) and len(value.strip()) >= SHORTEST}
    if not found:
        return []
    from urllib.parse import quote

    found |= {value.strip() for value in found}
    return sorted(found | {quote(value, safe="") for value in found}, key=len, reverse=True)


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
