"""A training run on the Hub: its right to write, checked before the run; its repository, made and pushed after it.

A failed push never fails the run: it is logged in one line, with the way out.
"""

import inspect
import logging
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi

from hub_upload import remote as hub
from hub_upload.card import write_card
from hub_upload.export import export
from hub_upload.limits import CHECKPOINT_HOURS, DEADLINE_HOURS, time_limit
from hub_upload.push import NO_TOKEN, push
from hub_upload.push_plan import PushArguments, plan

REPOSITORY = "repository"  # folder in that of the run, until it is on the Hub
CHECKPOINTS = "checkpoints"  # branch
FORMATS = ("transformers", "open_clip", "sentence_transformers")  # onnx takes minutes, and packages of its own
logger = logging.getLogger("capivara")


def check_access(repo_id: str, private: bool = False) -> None:
    """Make sure, before hours of work, that a model can be pushed; the repository is made where there is none.

    Raises ValueError where the name is none of the Hub, PushError where the token or the repository is not as needed.
    """
    hub.check_repo_id(repo_id)
    if hub.user_name(repo_id, "model") is None:
        raise hub.PushError(NO_TOKEN)
    remote, api = hub.look(repo_id, "model", "main"), HfApi()
    hub.check_visibility(repo_id, remote, private)
    with hub.hub_errors(repo_id, "model"):
        if not remote.exists:
            api.create_repo(repo_id, private=private or None)
        elif "write" in inspect.signature(api.auth_check).parameters:  # not in the first releases of 2.x
            hub.with_retries(lambda: api.auth_check(repo_id, write=True))


def publish_run(run: Path, repo_id: str, private: bool = False, card_language: str = "en") -> bool:
    """Make the repository of a finished run, with its card in "en" or "pt", and push it; whether the Hub has it now.

    Where the push fails the repository stays in the run's folder, to be pushed later.
    """
    repository = run / REPOSITORY
    words = ["python", "-m", "hub_upload.push", "--model", str(repository), "--repo-id", repo_id, "--push"]
    try:
        export(run, repository, FORMATS, overwrite=True, repo_id=repo_id)
        write_card(repository, repo_id, card_language)
        with time_limit(DEADLINE_HOURS):
            url = push(plan(PushArguments(repository, repo_id, private=private)))
    except (Exception, KeyboardInterrupt) as error:  # of whatever kind: the run is complete, and must not seem to fail
        way_out = "Make its repository by `python -m hub_upload.export`, and push that by `python -m hub_upload.push`."
        if repository.is_dir():
            way_out = f"Push it later: {shlex.join(words + ['--private'] * private)}"
        logger.warning("NOT PUSHED to %s: %s\nThe run is complete in %s. %s", repo_id, _said(error), run, way_out)
        return False
    shutil.rmtree(repository, ignore_errors=True)
    logger.info("Pushed to %s.", hub.plain_line(url)) if url else logger.info("%s has all of it already.", repo_id)
    return True


def publish_checkpoint(save: Callable[[Path], None], folder: Path, repo_id: str, step: int) -> bool:
    """Push the model as it is after a step to the branch `checkpoints`; whether the Hub has it now.

    Args:
        save: writes a model folder.
        folder: for temporary files, twice the size of the model.
        repo_id: owner/name, of a repository that exists.
        step: for the title of the commit.
    """
    try:
        with TemporaryDirectory(dir=folder, prefix="tmp-hub-") as temporary:
            model, repository = Path(temporary, "model"), Path(temporary, REPOSITORY)
            save(model)
            export(model, repository, ("transformers",))
            with time_limit(CHECKPOINT_HOURS):
                push(plan(PushArguments(repository, repo_id, revision=CHECKPOINTS, message=f"Step {step}")))
    except Exception as error:  # of whatever kind: the run matters more
        logger.warning("Step %s was not pushed to %s: %s Training continues.", step, repo_id, _said(error))
        return False
    logger.info("Pushed step %s to the branch %s of %s.", step, CHECKPOINTS, repo_id)
    return True


def _said(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "Stopped."
    return " ".join(hub.plain(str(error)).split()) if isinstance(error, ValueError | OSError) else hub.one_line(error)
