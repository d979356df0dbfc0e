"""The upload of an exported model to the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cooper_jax.settings.setup_errors import SetupError

TOKEN = "HF_TOKEN"  # the environment variable
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_push_errors(repository: str) -> list[str]:
    """Write a message for each reason for which a push must fail: a malformed name, no token, no network.

    repository: as --push gives it, NAMESPACE/NAME.
    """
    errors = []
    if not _REPOSITORY.fullmatch(repository) or "--" in repository or ".." in repository:
        errors.append(f"--push={repository}: write NAMESPACE/NAME, as in my-group/my-model")
    if not os.environ.get(TOKEN):
        errors.append(f"--push: set {TOKEN} in the environment to a token that may write to {repository}")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        errors.append("--push: HF_HUB_OFFLINE forbids it: unset the variable")
    return errors


def push_directory(directory: str | Path, repository: str, message: str, private: bool) -> str:
    """Create the repository if there is none, and upload a directory as one commit; returns the address.

    private: for a repository that is created here; one that exists stays as visible as it is.

    Raises SetupError for what the hub refuses and for a hub that cannot be reached: the directory stays.
    """
    import httpx
    import huggingface_hub

    api = huggingface_hub.HfApi(token=os.environ[TOKEN])
    try:
        api.create_repo(repository, repo_type="model", private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, repo_type="model", folder_path=str(directory), commit_message=message
        )
    # The hub's refusals, errors of the network and of files, and names that the library refuses.
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise SetupError(
            f"--push={repository}: {' '.join(str(error).split())}; {directory} is complete: push it again, or "
            f"`hf upload {repository} {directory}`"
        ) from error
    return commit.repo_url.url if commit.repo_url else repository
