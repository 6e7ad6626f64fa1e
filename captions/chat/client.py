"""Send requests to servers that speak OpenAI's protocol, many at the same time, and read the answers.

The official client of OpenAI sends the requests. Its own retries are off, because `captions.http_service.Retries`
decides about them, as for all services. The key comes from the environment variable OPENAI_API_KEY only. It is sent to
the addresses of the flag `base_url` and to no other host: redirects are not followed, and unencrypted requests ignore
the proxies of the environment.
"""

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from captions.chat.answers import Answer
from captions.chat.flags import parse_extra_body
from captions.chat.prompts import Message
from captions.http_service import RETRYABLE_STATUS_CODES, Failure, Retries, check_key, hide_key, parse_retry_after

API_KEY_VARIABLE = "OPENAI_API_KEY"
NO_KEY = "no-key"  # sent if the variable is not set: servers of one's own need no key, but the client requires one
RETRY_TEMPERATURE = 0.7  # lowest sampling temperature of the second request after a bad answer
PROBE_TRIES = 2  # attempts of the request that checks a server before any work
# HTTP status codes of requests whose content a server refuses. A run goes on, unless many are refused in a row.
ITEM_STATUS_CODES, MAX_REFUSED_IN_A_ROW = (400, 413, 422), 20
MAX_TOKENS = 10**8  # largest number of tokens of a request that is believed; reports add up 32-bit numbers
MAX_REASON_CHARACTERS = 300  # longer reasons of a server are shortened: some servers send a page of HTML
# What to do about the HTTP status codes of requests that a server refuses. {url} stands for the address.
ADVICE = {
    401: f"Set the environment variable {API_KEY_VARIABLE} to a valid key.",
    403: f"Check the permissions of the key in {API_KEY_VARIABLE}.",
    404: "Check --model and --base_url; the address of most servers ends in /v1.",
    413: "The request is too large: lower --image_side or --captions_per_request.",
}
BAD_REQUEST_ADVICE = "Check --model, --max_tokens and --extra_body; to caption images, the model must take images."
REDIRECT_ADVICE = "The server redirects to another address, to which nothing was sent. Use its final address."
logger = logging.getLogger("capivara")

T, R = TypeVar("T"), TypeVar("R")


@dataclass(frozen=True)
class Choice:
    """One answer of a model.

    Attributes:
        text: Content of the answer.
        finish_reason: Why the model stopped, for example "stop" or "length".
        refusal: Explanation of a refusal, if the server states one.
    """

    text: str
    finish_reason: str | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class Reply:
    """Reply of a server to one request.

    Attributes:
        choices: The answers, at least one. Servers may return fewer than requested.
        model: Name of the model as the server reports it.
        prompt_tokens: Number of tokens that the model has read.
        completion_tokens: Number of tokens that the model has written.
    """

    choices: list[Choice]
    model: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class ChatClient:
    """Client of one or several servers that serve the same model.

    Call `connect` before all other methods.

    Args:
        args: Flags of the command: `ChatFlags` and `model`.
        rank: Number of the task. Tasks begin with different servers.

    Attributes:
        model: Name of the model as the servers report it; the flag `model` before `connect`.

    Raises:
        ValueError: If the key contains characters that cannot be sent.
    """

    def __init__(self, args: Any, rank: int = 0):
        import openai  # extra `chat`

        self._key = os.environ.get(API_KEY_VARIABLE, "").strip()
        check_key(self._key or NO_KEY, API_KEY_VARIABLE, "The chat backend needs a key without blanks")
        for name in ("httpx", "httpx2"):  # the HTTP library logs a line for each request
            logging.getLogger(name).setLevel(logging.WARNING)
        self._args, self.model, self._runner = args, args.model, asyncio.Runner()
        self._clients = [
            openai.AsyncOpenAI(
                base_url=url,
                api_key=self._key or NO_KEY,
                timeout=args.timeout,
                max_retries=0,
                http_client=openai.DefaultAsyncHttpxClient(
                    follow_redirects=False, trust_env=url.startswith("https://"), timeout=args.timeout
                ),
            )
            for url in args.base_url
        ]
        self._numbers = itertools.count(rank)  # the number of a request chooses its server
        self._paused_until = 0.0  # all requests wait until this time if a server has asked for a pause
        self._is_connected, self._refused = False, 0  # number of requests that were refused since the last answer
        self._start, self.prompt_tokens, self.completion_tokens = time.monotonic(), 0, 0

    def connect(self, messages: Sequence[Message], is_check: bool = False) -> int:
        """Send a request for a single token to each server, which shows whether address, key and model are right.

        Args:
            messages: Conversation of the request.
            is_check: Give up early, and warn if a server does not list the model.

        Returns:
            Number of tokens that the model of the last server has read; 0 if the server does not state it.

        Raises:
            ValueError: If a server refuses the request, or the servers report different models.
            ConnectionError: If a server cannot be reached.
        """
        names = set()
        for number, client in enumerate(self._clients):
            if is_check:
                self._runner.run(self._warn_if_unlisted(client))
            tries = PROBE_TRIES if is_check else None
            reply = self._runner.run(self._send(messages, number=number, max_tries=tries, max_tokens=1))
            names.add(reply.model)
        if len(names) > 1:
            raise ValueError(f"All servers of base_url must serve the same model, got {', '.join(sorted(names))}.")
        (self.model,), self._is_connected = names, True
        self._start, self.prompt_tokens, self.completion_tokens = time.monotonic(), 0, 0
        return reply.prompt_tokens

    async def _warn_if_unlisted(self, client: Any) -> None:
        """Log a warning if a server does not list the requested model. Servers without a list are accepted."""
        try:
            names = [model.id for model in (await client.models.list()).data]
        except Exception:  # the request for a single token reports errors
            return
        if self._args.model not in names:
            listed = ", ".join(map(str, names[:10])) or "none"
            logger.warning("WARNING: %s does not list the model %s, but: %s", client.base_url, self._args.model, listed)

    def map(self, function: Callable[[T], Awaitable[R]], items: Sequence[T]) -> list[R]:
        """Call an asynchronous function with each item, for at most `concurrency` items at the same time.

        Args:
            function: Function that sends requests with this client.
            items: Arguments of the calls.

        Returns:
            The results, in the order of the items.

        Raises:
            ValueError, OSError: The first error of a call. The other calls are canceled.
        """
        return self._runner.run(self._map(function, items))

    async def _map(self, function: Callable[[T], Awaitable[R]], items: Sequence[T]) -> list[R]:
        """Do the work of `map` in the event loop."""
        results: list[Any] = [None] * len(items)
        remaining = iter(enumerate(items))

        async def work() -> None:
            for place, item in remaining:
                results[place] = await function(item)

        workers = [asyncio.ensure_future(work()) for _ in range(min(self._args.concurrency, len(items)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return results

    async def ask(
        self,
        messages: Sequence[Message],
        judge: Callable[[Choice], tuple[str, str | None]],
        n: int = 1,
        response_format: dict[str, object] | None = None,
    ) -> list[Answer]:
        """Request answers, and request a bad answer once more with a higher temperature.

        Servers may ignore `n` and return a single choice, so that requests are repeated until there are enough choices.

        Args:
            messages: The conversation.
            judge: Function that returns the cleaned text of a choice, and its fault or None.
            n: Number of answers.
            response_format: Schema of the answer, which is sent if the flag `response_schema` is set.

        Returns:
            `n` answers. The tokens of a request are counted in its first answer.

        Raises:
            ValueError: If the server refuses the request.
            ConnectionError: If the server has failed too often.
        """
        options = {"response_format": response_format} if self._args.response_schema and response_format else {}
        answers: list[Answer] = []
        while len(answers) < n:
            missing = n - len(answers)
            reply = await self._send(messages, **options, **({"n": missing} if missing > 1 else {}))
            tokens = reply.prompt_tokens, reply.completion_tokens
            for choice in reply.choices[:missing]:
                answers.append(Answer(*judge(choice), *tokens))
                tokens = 0, 0
        for place, first in enumerate(answers):
            if first.fault is not None:
                reply = await self._send(
                    messages, **options, temperature=max(self._args.temperature, RETRY_TEMPERATURE)
                )
                second = Answer(*judge(reply.choices[0]))
                answers[place] = replace(
                    second if second.fault is None else first,
                    prompt_tokens=first.prompt_tokens + reply.prompt_tokens,
                    completion_tokens=first.completion_tokens + reply.completion_tokens,
                    retried=True,
                )
        return answers

    async def _send(
        self, messages: Sequence[Message], number: int | None = None, max_tries: int | None = None, **options: Any
    ) -> Reply:
        """Send a request until it succeeds.

        Args:
            messages: The conversation.
            number: Index of the server; None to take the servers in turn.
            max_tries: Largest number of attempts. Default: that of `Retries`.
            **options: Parameters of the request that replace those of the flags.

        Raises:
            ValueError: If the server refuses the request, or reports another model than before.
            ConnectionError: If the request has failed too often.
        """
        sampling = {name: getattr(self._args, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
        parameters = {name: value for name, value in (sampling | options).items() if value is not None}
        parameters |= {"messages": messages, "extra_body": parse_extra_body(self._args.extra_body)}
        first = next(self._numbers) if number is None else number
        retries: Retries | None = None
        while True:
            place = (first + (retries.failed if retries and number is None else 0)) % len(self._clients)
            client, url = self._clients[place], self._args.base_url[place]
            retries = retries or Retries(url, max_tries=max_tries)
            retries.service = url
            await asyncio.sleep(max(0.0, self._paused_until - time.monotonic()))
            try:
                async with asyncio.timeout(self._args.timeout):
                    completion = await client.chat.completions.create(model=self._args.model, **parameters)
                reply = read_reply(completion)
                break
            except Exception as error:  # the client and the HTTP library raise errors of many types
                failure = self._describe_failure(error)
                if self._is_refusal_of_item(error):
                    return Reply([Choice("", refusal=failure.reason)], self.model)
            # This is outside of `except`, so that the original error, which may contain the key, is not chained.
            wait = retries.seconds_before_next(failure)
            if failure.retry_after_s is not None:  # the pause is for all requests
                self._paused_until = max(self._paused_until, time.monotonic() + wait)
            await asyncio.sleep(wait)
        if self._is_connected and reply.model != self.model:
            raise ValueError(
                f"{url} answers with the model {reply.model}, but {self.model} gave the answers before. One run needs "
                "one model: restore it, or start anew with another output."
            )
        self._refused = 0
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        return reply

    def _is_refusal_of_item(self, error: Exception) -> bool:
        """Return True if a server refuses a single request, so that only its caption is lost.

        The reason can be a content filter, or a text that is too long. If many requests are refused in a row, the
        reason must be another one, and the result is False.
        """
        if not self._is_connected or getattr(error, "status_code", None) not in ITEM_STATUS_CODES:
            return False
        self._refused += 1
        return self._refused < MAX_REFUSED_IN_A_ROW

    def _describe_failure(self, error: Exception) -> Failure:
        """Explain the exception that a request raised, in one line and without the key."""
        import openai

        # The message of a connection error is in its cause.
        text = f"{error}" if getattr(error, "status_code", None) else f"{error.__cause__ or error}"
        reason = hide_key(" ".join(text.split()), self._key)[:MAX_REASON_CHARACTERS] or type(error).__name__
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            advice = ADVICE.get(status, REDIRECT_ADVICE if status < 400 else BAD_REQUEST_ADVICE)
            # A used-up quota has status 429, too, but waiting does not help.
            is_temporary = status in RETRYABLE_STATUS_CODES and error.code != "insufficient_quota"
            wait = parse_retry_after(error.response.headers.get("retry-after"))
            reason = f"HTTP status {status}: {reason}" + ("" if is_temporary else f" {advice}")
            return Failure(reason, is_temporary, wait)
        if isinstance(error, TimeoutError | openai.APITimeoutError):
            reason = f"no complete answer within {self._args.timeout:g} s (--timeout)"
        elif not isinstance(error, openai.APIConnectionError | OSError):
            reason = "the response was no chat completion; does --base_url lead to the API of the server?"
        else:
            reason = f"no connection: {reason}"
        return Failure(reason, is_temporary=True)

    def describe_usage(self) -> str:
        """Return tokens per second and, with `price_per_million`, the cost since `connect`, for the progress bar."""
        tokens = self.prompt_tokens + self.completion_tokens
        text = f"{tokens / max(time.monotonic() - self._start, 1e-9):,.0f} tokens/s"
        if prices := self._args.price_per_million:
            cost = (self.prompt_tokens * prices[0] + self.completion_tokens * prices[-1]) / 1e6
            text += f", cost {cost:.2f}"
        return text


def read_reply(completion: Any) -> Reply:
    """Convert a response of the client to a `Reply`.

    Raises TypeError or AttributeError if the response is not a chat completion with at least one choice. The client
    does not check responses: it returns a text if a server sends HTML.
    """
    choices = [
        Choice(
            _storable_text(choice.message.content or ""),
            choice.finish_reason,
            _storable_text(getattr(choice.message, "refusal", None) or "") or None,
        )
        for choice in completion.choices
    ]
    if not choices:
        raise TypeError("the response contained no choices")
    usage = completion.usage
    tokens = [
        min(max(0, int(getattr(usage, name, None) or 0)), MAX_TOKENS) for name in ("prompt_tokens", "completion_tokens")
    ]
    return Reply(choices, str(completion.model), *tokens)


def _storable_text(text: str) -> str:
    """Return a text without zero bytes and half surrogate pairs, which parquet files and terminals cannot hold."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()
