"""What of a run goes to the Hub: the arguments. `hub_upload.publish` does it."""

from dataclasses import dataclass, field
from typing import Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


@dataclass
class Hub:
    _argument_group_name = "hub"

    push_to_hub: bool = field(
        default=False,
        metadata={
            "help": "Push the model to the Hub when the run is complete. The right to write is checked before it, when "
            "the repository is made; a push that fails is told, with the command that repeats it, and the run "
            "ends as without it. The token is huggingface_hub's own: HF_TOKEN, or that of `hf auth login`."
        },
    )
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository on the Hub, owner/name."})
    hub_strategy: Literal["end", "checkpoint"] = field(
        default="end",
        metadata={
            "help": "end = the finished model; checkpoint = also the model at every checkpoint of the run, as a commit "
            "on the branch `checkpoints`, while the training waits."
        },
    )
    hub_private: bool = field(default=False, metadata={"help": "Make a new repository private."})

    def check_hub(self, runs: int) -> None:
        """Raise ValueError where nothing could be pushed; nobody is asked. Values are not shown: one may be a token."""
        if self.hub_model_id is not None:
            try:
                validate_repo_id(self.hub_model_id)
            except HFValidationError:
                raise ValueError("hub_model_id must be owner/name, in letters, digits, '-', '_' and '.'.") from None
            if self.hub_model_id.count("/") != 1:
                raise ValueError("hub_model_id must be owner/name, such as my-name/my-model.")
        if not self.push_to_hub:
            return
        if self.hub_model_id is None:
            raise ValueError("push_to_hub needs hub_model_id, the owner/name of the repository.")
        if runs > 1:
            raise ValueError(
                f"push_to_hub is for one model, got runs: {runs}. Push the seed of your choice afterwards, by "
                "`python -m hub_upload.export` and `python -m hub_upload.push`."
            )
