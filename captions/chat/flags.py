"""Flags that the chat backends of `captions.generate` and `captions.translate` share."""

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capivara_common.cli import check_at_least, check_between, flag
from capivara_common.environment import require_packages
from captions.http_service import check_address, is_loopback

CHAT = "chat: a model on a server that speaks OpenAI's protocol"  # title of the group in `--help`
RESERVED_KEYS = ("model", "messages", "n", "stream")  # keys of a request that `--extra_body` must not replace
# JSON keys and values that look like those of a secret.
SECRET_RE = re.compile(
    r'"(?:[\w-]*api[_-]?key|authorization|[\w-]*secret|password)"\s*:|"(?:Bearer |sk-)', re.IGNORECASE
)
logger = logging.getLogger("capivara")


@dataclass(kw_only=True)
class ChatFlags:
    """Flags of the chat backends. Most names are those of the `openai` client."""

    base_url: list[str] = flag(
        [],
        "Addresses of the servers, usually with /v1 at the end. Requests are spread over all of them, and a request "
        "that fails is repeated at the next one. All must serve the same model.",
        group=CHAT,
    )
    concurrency: int = flag(
        8, "Requests in flight at the same time, per task: tasks that share a server multiply this number.", group=CHAT
    )
    prompts: Path | None = flag(
        None, "YAML file of prompts. Default: a file in captions/chat/, which also explains the format.", group=CHAT
    )
    temperature: float = flag(0.0, "Sampling temperature. A bad answer is requested once more with 0.7.", group=CHAT)
    top_p: float | None = flag(None, "Nucleus sampling. Default: not sent.", group=CHAT)
    seed: int | None = flag(None, "Seed of the sampling. Default: not sent.", group=CHAT)
    max_tokens: int = flag(1024, "Largest number of tokens of an answer, including reasoning.", group=CHAT)
    timeout: float = flag(120.0, "Seconds until a request without a complete answer is repeated.", group=CHAT)
    response_schema: bool = flag(
        False, "Send a JSON schema of the answer, for servers that can restrict answers to a schema.", group=CHAT
    )
    extra_body: str | None = flag(
        None,
        "JSON object with further keys of requests, for example "
        '\'{"chat_template_kwargs": {"enable_thinking": false}}\' (vLLM). A key replaces that of a flag; '
        "null omits it.",
        group=CHAT,
    )
    price_per_million: list[float] = flag(
        [], "Price of a million tokens, or two prices: read and written. Progress then shows the cost.", group=CHAT
    )
    allow_http: bool = flag(False, "Allow servers on other machines without encryption (http).", group=CHAT)


def check_chat_flags(args: Any, purpose: str) -> None:
    """Check the flags of a chat backend, without a network.

    Args:
        args: Flags of the command: `ChatFlags`, `model` and `executor`.
        purpose: The flag that selects the backend, for example "--backend chat".

    Raises:
        ValueError: If a flag is missing or invalid.
        ImportError: If the packages of the extra `chat` are not installed.
    """
    require_packages(purpose, "chat", "openai", "language_data")
    if not args.base_url:
        raise ValueError(f"{purpose} requires --base_url, for example --base_url http://localhost:8000/v1.")
    for url in args.base_url:
        check_address(url, "base_url", args.allow_http)
    check_at_least(args, 1, "concurrency", "max_tokens")
    check_at_least(args, 0.001, "timeout")
    check_between(args, 0, 2, "temperature")
    check_between(args, 0, 1, "top_p")
    if len(args.price_per_million) > 2 or any(not price >= 0 for price in args.price_per_million):
        raise ValueError(f"price_per_million must be one or two prices, got {args.price_per_million}.")
    parse_extra_body(args.extra_body)


def parse_extra_body(text: str | None) -> dict[str, Any]:
    """Return the flag `extra_body` as a dict, which is empty if the flag is None.

    Raises ValueError if the text is not a JSON object, contains one of `RESERVED_KEYS`, or seems to contain a key of a
    provider, which would be stored with the settings.
    """
    if SECRET_RE.search(text or ""):  # the text is not shown
        raise ValueError("extra_body must not contain a key. It belongs in the environment variable OPENAI_API_KEY.")
    try:
        content = json.loads(text or "{}")
    except ValueError:
        content = None
    if not isinstance(content, dict) or (reserved := sorted(content.keys() & set(RESERVED_KEYS))):
        rule = f"must not contain {', '.join(reserved)}" if isinstance(content, dict) else "must be a JSON object"
        raise ValueError(f"extra_body {rule}, got {text!r}.")
    return content


def is_server_beside_tasks(args: Any) -> bool:
    """Return True if each node of a cluster has a server of its own, which cannot be asked from this machine."""
    return args.executor != "local" and all(map(is_loopback, args.base_url))


def sampling_settings(args: Any) -> dict[str, Any]:
    """Return the flags that change the answers of a model, for the fingerprint and as parameters of requests."""
    settings = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    return settings | {
        "max_tokens": args.max_tokens,
        "response_schema": args.response_schema,
        "extra_body": parse_extra_body(args.extra_body),
    }
