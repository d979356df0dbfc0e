"""Typed settings of launch/serve.py: the config's `serve` section."""

from __future__ import annotations

import dataclasses
import ipaddress
import os

from ml_collections import ConfigDict

from cooper_jax.settings import bounds, typed_config
from cooper_jax.settings.secrets import find_secrets

MODELS = ("all", "policy", "reward")


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Settings of the server: the config's `serve` section, where each has its comment."""

    # What is served, and to whom.
    models: str
    policy_name: str
    reward_name: str
    host: str
    port: int
    key_env: str
    # Sizes.
    slots: int
    max_prompt_tokens: int
    max_new_tokens: int
    segment: int
    # Limits.
    max_waiting: int
    max_waiting_scores: int
    max_body_mb: float
    body_timeout: float
    timeout: float
    shutdown_timeout: float

    def __post_init__(self) -> None:
        errors = bounds.find_out_of_bounds(self, "serve")
        if self.policy_name == self.reward_name:
            errors.append(
                f"serve.policy_name={self.policy_name!r}, serve.reward_name={self.reward_name!r}: give two "
                "different names"
            )
        errors += self._find_key_problems()
        typed_config.raise_errors(errors)

    @classmethod
    def from_config(cls, section: ConfigDict) -> ServeConfig:
        """Read the `serve` section.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, "serve")

    @property
    def max_body_bytes(self) -> int:
        """Limit of a request's body."""
        return int(self.max_body_mb * 1e6)

    def read_key(self) -> str:
        """The API key from the environment variable `key_env`; "" if none is asked for."""
        return os.environ.get(self.key_env, "").strip() if self.key_env else ""

    def _find_key_problems(self) -> list[str]:
        """Messages for a key that cannot be one, and for a server that others reach without a key."""
        if secrets := find_secrets("serve", "", self.key_env):
            return secrets
        key = self.read_key()
        if key and not (key.isascii() and key.isprintable()):
            return [f"the environment variable {self.key_env} contains characters that no key has"]
        if key or not self.key_env or _is_loopback(self.host):
            return []
        return [
            f"serve.host={self.host!r}: other machines reach this server, but the environment variable "
            f'{self.key_env} contains no key: set it, or declare with --config.serve.key_env="" that none is '
            "needed"
        ]


def _is_loopback(host: str) -> bool:
    """Tell whether an address reaches this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
