"""The files of the user's that a run's flags name: checks before models are loaded, and a list of all of them."""

from __future__ import annotations

from cooper_jax.data import data_sources
from cooper_jax.settings.user_code import UserCode, is_user_code, load_function, read_user_code
from cooper_jax.trainer.reward_functions import RewardFunctions
from cooper_jax.trainer.run_settings import RunSettings


def check_user_assistant(settings: RunSettings) -> None:
    """Import the user's assistant, if there is one.  Raises SetupError for a file that cannot be used."""
    if settings.assistant is not None and is_user_code(settings.assistant.kind):
        code = read_user_code(settings.assistant.kind, "assistant.kind")
        load_function(code, "assistant.kind", allows_class=True)


def list_user_code(settings: RunSettings, reward_functions: RewardFunctions | None) -> list[UserCode | None]:
    """The files behind a run's rewards and data; None for a built-in reward."""
    codes: list[UserCode | None] = []
    if reward_functions is not None:
        codes += [term.code for term in reward_functions.terms]
    sources = (*settings.data.train_sources, *settings.data.eval_sources, settings.supervised.reward_data)
    for source in map(data_sources.strip_name, sources):
        if is_user_code(source):
            codes.append(read_user_code(source, "data"))
    return codes
