"""Redact credentials before printing and recording: logins and signatures in URLs, the commands of pipes."""

from __future__ import annotations

import re
from typing import Any

_URL = re.compile(r"(?<![A-Za-z0-9+.-])(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,30}://)(?P<rest>(?:(?!::)\S)*)")
_PIPE = re.compile(r"(?P<before>^|shards:|::)pipe:\s*(?P<word>[\w./-]*)(?:(?!::).)*", re.DOTALL)
# WebDataset puts an environment variable's value in its place; the name alone gives nothing away.
_VARIABLE = re.compile(r"\$\{\w+\}")


def without_secrets(text: str) -> str:
    """Return a text with no login and no query in its URLs, and of a pipe only its program.

    `https://me:pass@host/x.tar?X-Amz-Signature=…` becomes `https://host/x.tar`, which names the same place to whoever
    may go there. A login or a query that is nothing but `${NAME}` stays: its value is in the environment. Text that is
    already without secrets comes back as it is.
    """
    if "://" not in text and "pipe:" not in text:
        return text  # records hold long texts, and few of them URLs
    return _URL.sub(_bare_url, _PIPE.sub(r"\g<before>pipe:\g<word> …", text))


def record_without_secrets(record: Any) -> Any:
    """Return JSON content with every text in it, at any depth, `without_secrets`."""
    if isinstance(record, str):
        return without_secrets(record)
    if isinstance(record, dict):
        return {key: record_without_secrets(value) for key, value in record.items()}
    if isinstance(record, (list, tuple)):
        return [record_without_secrets(value) for value in record]
    return record


def _bare_url(match: re.Match[str]) -> str:
    address, mark, query = match["rest"].partition("?")
    if not _VARIABLE.fullmatch(query):
        mark = query = ""
    host, slash, path = address.partition("/")
    login, at, host_alone = host.rpartition("@")
    if at and not _VARIABLE.fullmatch(login):
        host = host_alone
    return f"{match['scheme']}{host}{slash}{path}{mark}{query}"
