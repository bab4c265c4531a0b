"""What secrets look like, in one list: for redacting, refusing, publishing and linting alike."""
from __future__ import annotations

import os
import re

# What secrets look like, by kind: the one list that redact, secret_problems, publish and
# tests/lint.py go by. The forms are those that the providers print, shorter ends included, so that
# a cut token is one still. Where a pattern has a group, the group is the secret and the rest is
# what gives it away.
SECRETS = {
    "a Hugging Face token": r"\b(?:hf_|api_org_)[A-Za-z0-9]{16,}",
    "a GitHub token": r"\b(?:gh[opsur]_[A-Za-z0-9]{16,}|github_pat_\w{16,})",
    "a GitLab token":
        r"\bgl(?:pat|oas|dt|rt|rtr|cbt|ptt|ft|imt|agent|soat|ffct|wt)-[\w.-]{16,}",
    "a Kaggle key": r"\bKAGGLE_KEY\W{1,4}([0-9a-f]{32})\b"
                    r"|\\?[\"']key\\?[\"']\s*:\s*\\?[\"']([0-9a-f]{32})\b",
    "a Kaggle token": r"\bKGAT_[\w-]{16,}",
    "a Google key":
        r"\bAIza[\w-]{30,}|\bya29\.[\w-]{20,}|\bGOCSPX-[\w-]{16,}|\b1//0[\w-]{30,}",
    "an AWS key":
        r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
        r"|(?i:\baws_?(?:secret_?access_?key|session_?token)\W{1,5})([A-Za-z0-9/+=]{40,})",
    "an OpenAI or Anthropic key": r"\bsk-(?=[\w-]*\d)[\w-]{20,}",
    "a Slack token": r"\b(?:xox[a-z]|xapp)-(?=[\w-]*\d)[\w-]{16,}"
                     r"|\bhooks\.slack\.com/services/[\w/]{16,}",
    "a Weights & Biases key":
        r"(?i:\bwandb_?(?:api_?)?key\W{1,5})([0-9a-f]{40})\b|\bwandb_v\d_\w{16,}",
    "a password of .netrc": r"\bmachine\s+\S+\s+login\s+\S+\s+password\s+(\S+)",
    "a PyPI token": r"\bpypi-(?=[\w-]*\d)[\w-]{30,}",
    "an npm token": r"\bnpm_[A-Za-z0-9]{30,}",
    "a Stripe key": r"\b(?:[prs]k_(?:live|test)_|whsec_)[A-Za-z0-9]{16,}",
    "a JSON web token": r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}",
    "a private key":
        r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
        r"(?:[\s\S]{0,20000}?-----END [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
        r"|[\sA-Za-z0-9+/=\\]{0,20000})",
    "a password in a URL":
        r"(?<=://)([^\s:@/'\"]{0,200}:(?!\{|<|\$\{|\$[A-Z_]+@)[^\s/'\"]{1,500}"
        r"|[^\s@/:'\"]{20,500})@",
    "a token in a header": r"\b(?:Bearer|Basic) +((?=[\w.~+/=-]*\d)[\w.~+/=-]{12,})",
    "a token in a URL":
        r"[?&][\w-]{0,40}(?i:token|key|secret|password|signature|credential)="
        r"(?![{<$])([^&\s'\"]{6,})",
}
_SECRETS = [re.compile(pattern, re.ASCII) for pattern in SECRETS.values()]
# Names of environment variables whose values are secret. TOKENIZER and TOKEN_BUDGET are parameters,
# not secrets: `make` puts what it was given on its command line into the environment too.
_SECRET_NAME = re.compile(r"TOKENS?(?:_|\d|$)|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|_PAT$"
                          r"|(?:^|_|API|ACCESS)KEY(?:_|\d|$)", re.IGNORECASE)
_NO_SECRET_NAME = re.compile(r"PATH|FILE|DIR|TOKEN_BUDGET", re.IGNORECASE)


def secret_values() -> dict[str, str]:
    """{name: value} of the environment variables whose names say that their values are secret.

    Short values are left out.
    """
    return {name: value for name, value in os.environ.items() if len(value) >= 8
            and _SECRET_NAME.search(name) and not _NO_SECRET_NAME.search(name)}


def secret_kinds(content: bytes | str) -> list[str]:
    """The kinds of SECRETS that text, or the bytes of a file, hold.

    Of bytes that are no text, such as weights, the printable stretches are searched: 48 MB took
    40 s whole, 1 s so.
    """
    if isinstance(content, bytes):
        try:
            content = content.decode()
        except UnicodeDecodeError:
            content = b"\0".join(re.findall(rb"[\t\n\r -~]{8,}", content)).decode()
    return [kind for kind, pattern in zip(SECRETS, _SECRETS) if pattern.search(content)]


def redact(text: str) -> str:
    """The text without what looks like a token or password, and without such variables' values."""
    for value in secret_values().values():
        text = text.replace(value, "[secret]")

    def hidden(found):
        parts = [part for part in found.groups() if part]
        return found[0].replace(parts[0], "[secret]") if parts else "[secret]"
    for pattern in _SECRETS:
        text = pattern.sub(hidden, text)
    return text


def secret_problems(**values) -> list[str]:
    """One sentence for each value that holds what looks like a token or password, without it."""
    def secret(value):
        try:
            if isinstance(value, str) and redact(value) != value:
                return True
            return redact(repr(value)) != repr(value)
        except ValueError:                            # a number too long to be written is no secret
            return False
    return [f"{name} holds what looks like a secret, and would be kept in clear (executed "
            "notebook, run.json): put it into the environment instead, such as HF_TOKEN."
            for name, value in values.items() if secret(value)]
