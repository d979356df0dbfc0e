"""Secrets in settings: settings are printed and stored with a run, so a key or a password in one is refused.

`check_secrets` checks a whole config, `find_secrets` the settings of one server.  The messages name the field and
do not repeat its value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from ml_collections import ConfigDict

from cooper_jax.settings.config_fields import flatten_config
from cooper_jax.settings.setup_errors import SetupError

# Fields of any section whose values may hold a key or a password: no message repeats a value that is refused.
MAY_HOLD_SECRETS = ("url", "key_env")

# Upper case alone: keys such as hf_..., gsk_... and tokens of small letters are no names.
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
# What keys of well-known services begin with.
_KEY_PREFIXES = (
    "sk-", "sk_", "hf_", "gsk_", "xai-", "AIza", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-",
    "nvapi-", "pplx-", "csk-", "r8_", "tgp_", "ya29.", "xoxb-", "xoxp-",
)  # fmt: skip
_AWS_KEY = re.compile(r"A[KS]IA[A-Z0-9]{12,}")
# No word is this long; a UUID is divided by dashes.
_LONG_RUN = re.compile(r"[A-Za-z0-9]{32,}")


def check_secrets(config: ConfigDict) -> None:
    """Raise SetupError with every field of a config that may hold a secret, whatever the job reads of it."""
    if messages := find_secrets_of_fields(flatten_config(config)):
        raise SetupError(*messages)


def find_secrets_of_fields(fields: Mapping[str, Any]) -> list[str]:
    """Write a message for each field that may hold a secret.  fields: dotted name -> value, of any fields."""
    errors = []
    for name, value in fields.items():
        section, _, field = name.rpartition(".")
        # Values of another type have messages of their own.
        if field in MAY_HOLD_SECRETS and isinstance(value, str):
            errors += find_secrets(section, **{"url": "", "key_env": "", field: value})
    return errors


def find_secrets(name: str, url: str, key_env: str) -> list[str]:
    """Write a message for each setting of a server that may hold a secret.  name: of the config's section."""
    errors = []
    if key_env and (not _VARIABLE.fullmatch(key_env) or _looks_like_key(key_env)):
        errors.append(
            f"{name}.key_env is no name of an environment variable (at most 64 capital letters, digits and _, with "
            f"no digit first): put the key into one, and give its name with --config.{name}.key_env=NAME"
        )

    # Read as text, since a secret may be in a URL that cannot be parsed, and messages about those repeat them.
    address = re.split(r"[?#]", url, maxsplit=1)
    advice = f"give the key in the environment variable that --config.{name}.key_env names"
    if "@" in address[0]:
        errors.append(f"{name}.url contains a name or a password (`...@`): {advice}")
    if len(address) > 1:
        errors.append(
            f"{name}.url contains a query (`?...`), which may hold a key: leave it out, and {advice}"
        )
    if any(map(_looks_like_key, _list_path_parts(address[0]))):
        errors.append(
            f"{name}.url contains what looks like a key (a part that begins like one, or 32 or more letters and "
            f"digits in a row): leave it out, and {advice}"
        )
    return errors


def _list_path_parts(address: str) -> list[str]:
    """Split the path of a URL at slashes and other marks; an address without a scheme is all path."""
    scheme, separator, rest = address.partition("://")
    path = rest.partition("/")[2] if separator else scheme
    return re.split(r"[^\w.~-]+", unquote(path))


def _looks_like_key(text: str) -> bool:
    """True for text that begins like a key, or has a long run of letters and digits."""
    if text.startswith(_KEY_PREFIXES) or _AWS_KEY.match(text):
        return True
    return any(re.search("[A-Za-z]", run) and re.search("[0-9]", run) for run in _LONG_RUN.findall(text))
