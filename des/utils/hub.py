"""Whether the Hugging Face hub can be reached; without it, the libraries use the models in the local cache at once."""

from functools import cache
from pathlib import Path

from des.utils.errors import names_beside, not_found
from des.utils.logs import logger

_SECONDS = 5  # to wait for the hub


def try_hub(source: str) -> None:
    """If `source` is a hub id, and the hub cannot be reached, switch this process to the local cache. The first call asks the hub.

    Otherwise huggingface_hub retries each file for half a minute. Raises UserError for a path that is missing and cannot be a hub id.
    """
    if Path(source).exists():
        return
    if source.startswith((".", "/", "~")) or source.partition("@")[0].count("/") > 1:
        raise not_found("the model", Path(source), "it is not a hub id either, which has the form `owner/name`")
    if not is_offline():
        _ask_hub()


def is_offline() -> bool:
    """Whether only models in the local cache are used: the hub cannot be reached, or HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def missing(source: str) -> str:
    """Why the model `source`, which is not in the local cache, cannot be loaded while `is_offline`, and what to do."""
    from huggingface_hub import constants

    asked = _ask_hub.cache_info().currsize
    why = f"the hub {constants.ENDPOINT} cannot be reached" if asked else "HF_HUB_OFFLINE is set"
    return (
        f"this machine has no complete copy of it, neither as a folder{_here(source)}, nor in the cache "
        f"{constants.HF_HUB_CACHE}, and {why}; download it where there is a connection (`hf download`), or name a local folder"
    )


def _here(source: str) -> str:
    return f" in the current folder, {Path.cwd()}{names_beside(Path(source))}"


def refusal(error: BaseException, source: str) -> str | None:
    """Say why the hub did not send a file of the repository `source`, and what to do; None if `error` is not a refusal of the hub."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{source.partition('@')[0]}"
        return f"its owner grants access on request; ask for it at {page}, and set HF_TOKEN to a token of that account"
    if isinstance(error, errors.RepositoryNotFoundError):
        nothing = f"neither a folder{_here(source)}, nor a repository of the hub that you may read"
        return f"{source} is {nothing}; correct the name, or for a private repository set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return "this revision does not exist in the repository; correct --revision"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return "this file does not exist in the repository, so it holds another kind of model"
    return None


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
