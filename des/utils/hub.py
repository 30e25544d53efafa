"""Whether the Hugging Face hub can be reached; without it, the libraries use the models in the local cache at once."""

from functools import cache
from pathlib import Path

from des.utils.logs import logger

_SECONDS = 5  # to wait for the hub


def try_hub(source: str) -> None:
    """If `source` is a hub id, and the hub cannot be reached, switch this process to the local cache. The first call asks the hub.

    Otherwise huggingface_hub retries each file for half a minute.
    """
    if not Path(source).exists() and not is_offline():
        _ask_hub()


def is_offline() -> bool:
    """Whether only models in the local cache are used: the hub cannot be reached, or HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def missing() -> str:
    """Why a model that is not in the local cache cannot be loaded while `is_offline`, and what to do."""
    from huggingface_hub import constants

    asked = _ask_hub.cache_info().currsize
    why = f"the hub {constants.ENDPOINT} cannot be reached" if asked else "HF_HUB_OFFLINE is set"
    return (
        f"it is not on this machine as a whole, neither as a folder nor in the cache {constants.HF_HUB_CACHE}, and {why}; download "
        "it where there is a connection (`hf download`), or name a local folder"
    )


@cache
def _ask_hub() -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception as error:  # of the HTTP library, which differs between versions of huggingface_hub
        constants.HF_HUB_OFFLINE = True
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning("the hub %s cannot be reached (%s); only models on this machine are used", constants.ENDPOINT, reason)
