"""Secrets in settings: settings are printed and stored with a run, so a key or a password in one is refused.

The messages name the field and do not repeat its value.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit


def find_secrets(name: str, url: str, key_env: str) -> list[str]:
    """Write a message for each setting of a server that may hold a secret.  name: of the config's section."""
    errors = []
    if key_env and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key_env):
        errors.append(
            f"{name}.key_env is no name of an environment variable: put the key into one, and give its name with "
            f"--config.{name}.key_env=NAME"
        )
    try:
        address = urlsplit(url)
        has_login, has_query = "@" in address.netloc, bool(address.query or address.fragment)
    except ValueError:
        return errors  # no URL at all, which others report
    if has_login:
        errors.append(
            f"{name}.url contains a name or a password: give the key in the environment variable that "
            f"--config.{name}.key_env names"
        )
    if has_query:
        errors.append(
            f"{name}.url contains a query (`?...`), which may hold a key: leave it out, and give the key in the "
            f"environment variable that --config.{name}.key_env names"
        )
    return errors
