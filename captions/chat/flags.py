"""Command-line flags of the backends that generate or translate captions with a language model on a server."""

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from capivara_common.cli import check_at_least, check_between, flag
from capivara_common.environment import require_packages
from captions.http_service import check_service_url, is_loopback
from captions.stages import Backend, RowStage

CHAT = "chat: a model on a server that speaks OpenAI's protocol"  # title of this group of flags in `--help`
RESERVED_KEYS = ("model", "messages", "n", "stream")  # keys of a request that `--extra_body` must not replace
# Matches JSON text that seems to contain a secret, for example the key `api_key` or a value that begins with `sk-`.
SECRET_RE = re.compile(
    r'"(?:[\w-]*api[_-]?key|authorization|[\w-]*secret|password)"\s*:|"(?:Bearer |sk-)', re.IGNORECASE
)
logger = logging.getLogger("capivara")


@dataclass(kw_only=True)
class ChatFlags:
    """Flags for backends that use a language model on a server, to generate or to translate captions.

    Most flags are named like the parameters of the `openai` client that they set.
    """

    base_url: list[str] = flag(
        [],
        "Addresses of the servers, usually with /v1 at the end. All servers must serve the same model. Requests go to "
        "the servers in turn, and a failed request is sent again to the next server.",
        group=CHAT,
    )
    concurrency: int = flag(
        8,
        "Largest number of simultaneous requests of each task (process). If several tasks share a server, the server "
        "gets this number of requests from each of them.",
        group=CHAT,
    )
    prompts: Path | None = flag(
        None, "YAML file of prompts. Default: a file in captions/chat/, which also explains the format.", group=CHAT
    )
    temperature: float = flag(
        0.0, "Sampling temperature. An unusable answer is requested once more with at least 0.7.", group=CHAT
    )
    top_p: float | None = flag(None, "Probability mass for nucleus sampling. Default: the server decides.", group=CHAT)
    seed: int | None = flag(None, "Random seed of the sampling. Default: the server decides.", group=CHAT)
    max_tokens: int = flag(1024, "Largest number of tokens of an answer, including reasoning.", group=CHAT)
    timeout: float = flag(
        120.0, "Largest number of seconds to wait for an answer. The request is then sent again.", group=CHAT
    )
    response_schema: bool = flag(
        False,
        "Request each answer as JSON with a given schema, so that it has no extra text. The server must support this.",
        group=CHAT,
    )
    extra_body: str | None = flag(
        None,
        "JSON object with more parameters for each request, for example "
        '\'{"chat_template_kwargs": {"enable_thinking": false}}\' (vLLM). A parameter replaces the flag of the same '
        "name. With the value null, the flag has no effect.",
        group=CHAT,
    )
    price_per_million: list[float] = flag(
        [],
        "Price of a million tokens: one price for all tokens, or two prices, for tokens read and for tokens written. "
        "The progress bar then shows the cost.",
        group=CHAT,
    )
    allow_http: bool = flag(False, "Allow unencrypted connections (http) to servers on other machines.", group=CHAT)


def check_chat_flags(args: Any, purpose: str) -> None:
    """Check the flags of a backend that uses a language model on a server. No request is sent.

    Args:
        args: Command-line arguments, with the flags of `ChatFlags`.
        purpose: The flag that selects the backend, for example "--backend chat", for error messages.

    Raises:
        ValueError: If a flag is missing or invalid.
        ImportError: If a package of the extra `chat` is missing.
    """
    require_packages(purpose, "chat", "openai", "language_data")
    if not args.base_url:
        raise ValueError(f"{purpose} requires --base_url, for example --base_url http://localhost:8000/v1.")
    for url in args.base_url:
        check_service_url(url, "base_url", args.allow_http)
    check_at_least(args, 1, "concurrency", "max_tokens")
    check_at_least(args, 0.001, "timeout")
    check_between(args, 0, 2, "temperature")
    check_between(args, 0, 1, "top_p")
    if len(args.price_per_million) > 2 or any(not price >= 0 for price in args.price_per_million):
        raise ValueError(f"price_per_million must be 1 or 2 prices (read, written), got {args.price_per_million}.")
    parse_extra_body(args.extra_body)


def parse_extra_body(text: str | None) -> dict[str, Any]:
    """Parse the flag `extra_body`, a JSON object with additional parameters for each request to the server.

    Args:
        text: Value of the flag. None if the flag is not set.

    Returns:
        The parameters as a dict `{"parameter": value}`. The dict is empty if `text` is None.

    Raises:
        ValueError: If the text is not a JSON object, contains one of `RESERVED_KEYS`, or seems to contain an API key.
    """
    # The flag is stored with the output, so it must not contain a secret. Logs must not contain it either, so the error
    # message does not quote the text.
    if SECRET_RE.search(text or ""):
        raise ValueError(
            "extra_body must not contain an API key or password. Set the environment variable OPENAI_API_KEY instead."
        )
    try:
        content = json.loads(text or "{}")
    except ValueError:
        content = None
    if not isinstance(content, dict) or (reserved := sorted(content.keys() & set(RESERVED_KEYS))):
        rule = f"must not contain {', '.join(reserved)}" if isinstance(content, dict) else "must be a JSON object"
        raise ValueError(f"extra_body {rule}, got {text!r}.")
    return content


class ChatBackend(Backend):
    """Base class of the backends that use a language model on a server, to generate or to translate captions.

    Args:
        args: Flags of the stage (step of the caption pipeline), such as `captions.translate`.
        stage: Access to the rows that will be processed. None: only check whether the servers can be used, with fewer
            attempts per request.

    Raises:
        ValueError: If a flag or the file of prompts is invalid, or the server refuses requests.
        ConnectionError: If the server can't be reached.
    """

    @classmethod
    def check(cls, args: Any) -> None:
        """Check that the servers can be used, by requesting an answer of a single token from each.

        The check is skipped on a cluster if all addresses are those of the local machine, such as localhost.

        Args:
            args: Flags of the stage.

        Raises:
            ValueError, OSError: If a server can't be used.
        """
        if args.executor != "local" and all(map(is_loopback, args.base_url)):
            logger.info(
                f"Not checked: {', '.join(args.base_url)}. On a cluster, a localhost address means that each node runs "
                "its own server, which this machine can't reach."
            )
        else:
            cls(args, None)

    @classmethod
    def load(cls, args: Any, stage: RowStage) -> Self:
        """Connect to the servers.

        Args:
            args: Flags of the stage.
            stage: Access to the rows that will be processed.

        Returns:
            The backend, ready to process the rows.

        Raises:
            ValueError, OSError: If a server can't be used.
        """
        return cls(args, stage)


def get_settings_that_change_answers(args: Any) -> dict[str, Any]:
    """Return the flags that affect what the language model answers, as a dict `{"flag name": value}`.

    The dict is recorded with the output. A later run reuses stored answers only if its flags are equal to this dict.

    Args:
        args: Command-line arguments, with `ChatFlags`.
    """
    names = ("temperature", "top_p", "seed", "max_tokens", "response_schema")
    return {name: getattr(args, name) for name in names} | {"extra_body": parse_extra_body(args.extra_body)}
