"""Send requests to servers that speak OpenAI's protocol, many at the same time, and read the answers.

The API key comes only from the environment variable OPENAI_API_KEY. It is sent only to the addresses of the flag
`base_url`.
"""

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from captions.chat.answers import Answer, Choice, build_json_response_format, extract_value_from_json_answer
from captions.chat.flags import parse_extra_body
from captions.chat.prompts import Message
from captions.http_service import RETRYABLE_STATUS_CODES, Failure, Retries, check_key, hide_key, parse_retry_after

API_KEY_VARIABLE = "OPENAI_API_KEY"
# Sent as the API key if OPENAI_API_KEY is not set: local servers need no key, but the `openai` client requires one.
NO_KEY = "no-key"
# After a bad answer, the request is sent again with at least this sampling temperature. With a temperature of 0, the
# model would give the same answer again.
RETRY_TEMPERATURE = 0.7
# Largest number of attempts for the request that tests a server before the work begins. It is low, so that a wrong
# address is reported soon.
PROBE_TRIES = 2
# ITEM_STATUS_CODES: HTTP status codes with which a server refuses the content of a single request, for example a text
# that is too long. After such a refusal, the run continues without this caption. After MAX_REFUSED_IN_A_ROW refusals in
# a row, the run stops, because the cause is then probably a general one, such as a wrong flag.
ITEM_STATUS_CODES, MAX_REFUSED_IN_A_ROW = (400, 413, 422), 20
# Upper limit for the token counts that a server reports for a request. A larger count must be an error of the server,
# and is replaced by this limit.
MAX_TOKENS = 10**8
# Longer error messages of a server are shortened, because some servers send a whole page of HTML.
MAX_REASON_CHARACTERS = 300
# HTTP status code of a refused request -> advice to the user, which is added to the error message.
ADVICE = {
    401: f"Set the environment variable {API_KEY_VARIABLE} to a valid key.",
    403: f"Check the permissions of the key in {API_KEY_VARIABLE}.",
    404: "Check --model and --base_url; the address of most servers ends in /v1.",
    413: "The request is too large: lower --image_side or --captions_per_request.",
}
BAD_REQUEST_ADVICE = "Check --model, --max_tokens and --extra_body; to caption images, the model must accept images."
REDIRECT_ADVICE = "The server redirects to another address, to which nothing was sent. Set --base_url to that address."
logger = logging.getLogger("capivara")

T, R = TypeVar("T"), TypeVar("R")


# Type of a function that checks an answer. Its arguments are the answer, and the value in it if the answer is JSON
# (otherwise None). It returns a tuple (cleaned text, fault). The fault names the problem; it is None for a good answer.
Judge = Callable[[Choice, object], tuple[str, str | None]]


@dataclass(frozen=True)
class Reply:
    """Everything that a server returns for one request: the answers of the model and the numbers of tokens.

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
    """Client that sends chat requests to one or several servers with OpenAI's protocol.

    All servers must serve the same model. Call `connect` before all other methods.

    Args:
        args: Command-line arguments, with the flags of `ChatFlags` and the flag `model`.
        rank: Index of this process, counted from 0, if several processes share the rows. It selects the first server.

    Attributes:
        model: Name of the model as the servers report it. Before `connect` is called, it is the flag `model`.

    Raises:
        ValueError: If the API key contains characters that can't be sent.
    """

    def __init__(self, args: Any, rank: int = 0):
        # Import here, because the package is only installed with the extra `chat`, and other backends do not need it.
        import openai

        self._key = os.environ.get(API_KEY_VARIABLE, "").strip()
        check_key(self._key or NO_KEY, API_KEY_VARIABLE, "The chat backend needs a key without blanks")
        # The HTTP library logs a line for each request, which would flood the output. Show only its warnings.
        for name in ("httpx", "httpx2"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._args, self.model, self._runner = args, args.model, asyncio.Runner()
        self._clients = []
        # Without redirects, and without the proxies of environment variables for unencrypted requests, the key reaches
        # only the servers. The client's own retries are off, because `Retries` decides about them for all services.
        for url in args.base_url:
            http_client = openai.DefaultAsyncHttpxClient(follow_redirects=False, trust_env=url.startswith("https://"))
            options = {"api_key": self._key or NO_KEY, "timeout": args.timeout, "max_retries": 0}
            self._clients.append(openai.AsyncOpenAI(base_url=url, http_client=http_client, **options))
        # Requests are numbered, and go to the servers in turn. Each task starts counting at its own number (`rank`), so
        # that the tasks do not all begin with the first server.
        self._numbers = itertools.count(rank)
        self._paused_until = 0.0  # end of a pause that a server has asked for, in seconds of `time.monotonic`
        # `_refused` counts the requests that the server has refused since its last answer.
        self._is_connected, self._refused = False, 0
        self._start, self.prompt_tokens, self.completion_tokens = time.monotonic(), 0, 0

    def connect(self, messages: Sequence[Message], is_check: bool = False) -> int:
        """Connect to the servers: request a single token from each, to check the address, the key and the model.

        Args:
            messages: Conversation to send.
            is_check: True: only check the servers in advance, with fewer attempts, and warn if a server does not list
                the model. False: connect before sending other requests.

        Returns:
            Number of tokens that the model read; 0 if the server does not report it.

        Raises:
            ValueError: If a server refuses the request, or the servers report different models.
            ConnectionError: If a server can't be reached.
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
        except Exception:  # errors are not reported here, because the next request of `connect` raises them
            return
        if self._args.model not in names:
            listed = ", ".join(map(str, names[:10])) or "none"
            logger.warning(f"WARNING: {client.base_url} does not list the model {self._args.model}. It lists: {listed}")

    def map(self, function: Callable[[T], Awaitable[R]], items: Sequence[T]) -> list[R]:
        """Call an asynchronous function with each item, several calls at the same time, and return the results.

        The flag `concurrency` is the largest number of simultaneous calls.

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
        """Call an asynchronous function with each item. This is the coroutine that `map` runs in an event loop."""
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
        self, messages: Sequence[Message], judge: Judge, json_key: str, n: int = 1, text_count: int | None = None
    ) -> list[Answer]:
        """Send a conversation to a server, and return `n` answers of the model. A bad answer is requested once more.

        Args:
            messages: The conversation.
            judge: Function that checks an answer and returns a tuple (cleaned text, fault or None).
            json_key: Key of the text in a JSON answer. It has an effect only with the flag `response_schema`.
            n: Number of answers.
            text_count: If given, a JSON answer has a list of this many texts instead of a single text.

        Returns:
            `n` answers. If the second answer is bad, too, the first one is returned with its fault.

        Raises:
            ValueError: If the server refuses the request.
            ConnectionError: If a request has failed too often.
        """
        is_json, answers = self._args.response_schema, []
        options = {"response_format": build_json_response_format(json_key, text_count)} if is_json else {}

        def check(choice: Choice) -> tuple[str, str | None]:
            return judge(choice, extract_value_from_json_answer(choice.text, json_key) if is_json else None)

        # Some servers ignore `n` and return a single answer, so requests are sent until there are `n` answers.
        while len(answers) < n:
            missing = n - len(answers)
            reply = await self._send(messages, **options, **({"n": missing} if missing > 1 else {}))
            tokens = reply.prompt_tokens, reply.completion_tokens
            for choice in reply.choices[:missing]:
                answers.append(Answer(*check(choice), *tokens))
                tokens = 0, 0  # the token counts of a request are stored only in its first answer
        for place, first in enumerate(answers):
            if first.fault is not None:
                temperature = max(self._args.temperature, RETRY_TEMPERATURE)
                reply = await self._send(messages, **options, temperature=temperature)
                tokens = reply.prompt_tokens, reply.completion_tokens
                second = Answer(*check(reply.choices[0]), *tokens, retried=True)
                chosen, other = (second, first) if second.fault is None else (first, second)
                answers[place] = chosen.with_cost_of(other)
        return answers

    async def _send(
        self, messages: Sequence[Message], number: int | None = None, max_tries: int | None = None, **options: Any
    ) -> Reply:
        """Send a request, repeat it after temporary failures, and return the reply.

        Args:
            messages: The conversation.
            number: Index of the server; None to take the servers in turn.
            max_tries: Largest number of attempts. Default: `captions.http_service.MAX_TRIES`.
            **options: Parameters of the request, which override the values of the flags.

        Returns:
            The reply. If the server refuses only the content of this request, it holds one choice with a refusal.

        Raises:
            ValueError: If the server refuses the request, or reports another model than before.
            ConnectionError: If the request has failed too often.
        """
        sampling = {name: getattr(self._args, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
        parameters = {name: value for name, value in (sampling | options).items() if value is not None}
        parameters |= {"messages": messages, "extra_body": parse_extra_body(self._args.extra_body)}
        first = next(self._numbers) if number is None else number
        retries = Retries("", max_tries=max_tries)
        while True:
            place = (first + (retries.failed if number is None else 0)) % len(self._clients)
            client, url = self._clients[place], self._args.base_url[place]
            retries.service = url
            await asyncio.sleep(max(0.0, self._paused_until - time.monotonic()))
            try:
                async with asyncio.timeout(self._args.timeout):
                    completion = await client.chat.completions.create(model=self._args.model, **parameters)
                reply = convert_completion_to_reply(completion)
                break
            except Exception as error:  # the client and its HTTP library raise errors of many unrelated types
                failure = self._describe_failure(error)
                if self._is_refusal_of_item(error):
                    return Reply([Choice("", refusal=failure.reason)], self.model)
            # After the last attempt, `seconds_before_next` raises an error. It must be called outside of the `except`
            # block: inside, Python would also show the original error, which may contain the API key.
            wait = retries.seconds_before_next(failure)
            # If the server has asked for a pause, all other requests of this client wait as well.
            if failure.retry_after_s is not None:
                self._paused_until = max(self._paused_until, time.monotonic() + wait)
            await asyncio.sleep(wait)
        if self._is_connected and reply.model != self.model:
            raise ValueError(
                f"{url} answers with the model {reply.model}, but the earlier answers are from {self.model}. All "
                "answers of a run must be from one model. Serve the earlier model again, or choose another --output."
            )
        self._refused = 0
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        return reply

    def _is_refusal_of_item(self, error: Exception) -> bool:
        """Return True if a server refuses only the content of one request, so that the run can continue without it.

        The reason can be a content filter, or a text that is too long. Returns False if `MAX_REFUSED_IN_A_ROW` requests
        were refused in a row, because the reason must then be a general one, such as a wrong flag.
        """
        if not self._is_connected or getattr(error, "status_code", None) not in ITEM_STATUS_CODES:
            return False
        self._refused += 1
        return self._refused < MAX_REFUSED_IN_A_ROW

    def _describe_failure(self, error: Exception) -> Failure:
        """Convert the exception that a request raised to a `Failure`, with a one-line reason without the API key."""
        import openai

        # A connection error of the client has a general message. The chained exception (`__cause__`) names the cause.
        text = f"{error}" if getattr(error, "status_code", None) else f"{error.__cause__ or error}"
        reason = hide_key(" ".join(text.split()), self._key)[:MAX_REASON_CHARACTERS] or type(error).__name__
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            advice = ADVICE.get(status, REDIRECT_ADVICE if status < 400 else BAD_REQUEST_ADVICE)
            # Status 429 usually means too many requests, and waiting helps. But OpenAI also sends it if the quota of
            # the account is used up, and then waiting does not help.
            is_temporary = status in RETRYABLE_STATUS_CODES and error.code != "insufficient_quota"
            reason = f"HTTP status {status}: {reason}" + ("" if is_temporary else f" {advice}")
            return Failure(reason, is_temporary, parse_retry_after(error.response.headers.get("retry-after")))
        if isinstance(error, TimeoutError | openai.APITimeoutError):
            reason = f"no complete answer within {self._args.timeout:g} s (--timeout)"
        elif not isinstance(error, openai.APIConnectionError | OSError):
            reason = "the response is not a chat completion; check that --base_url is the address of the server's API"
        else:
            reason = f"no connection: {reason}"
        return Failure(reason, is_temporary=True)

    def describe_usage(self) -> str:
        """Return a note for the progress bar, such as "1,200 tokens/s, cost 0.35".

        The cost is shown only if the flag `price_per_million` is set.
        """
        tokens = self.prompt_tokens + self.completion_tokens
        text = f"{tokens / max(time.monotonic() - self._start, 1e-9):,.0f} tokens/s"
        if prices := self._args.price_per_million:
            cost = (self.prompt_tokens * prices[0] + self.completion_tokens * prices[-1]) / 1e6
            text += f", cost {cost:.2f}"
        return text


def convert_completion_to_reply(completion: Any) -> Reply:
    """Convert a response of the `openai` client to a `Reply`, and check that it is a chat completion.

    Raises TypeError or AttributeError if the response is not a chat completion with at least one answer.

    Args:
        completion: Return value of the client's method `chat.completions.create`.
    """
    choices = []
    # The client does not check responses. If a server sends HTML, for example, `completion` is a str.
    for choice in completion.choices:
        refusal = _storable_text(getattr(choice.message, "refusal", None) or "") or None
        choices.append(Choice(_storable_text(choice.message.content or ""), choice.finish_reason, refusal))
    if not choices:
        raise TypeError("the response contained no choices")
    tokens = [getattr(completion.usage, name, None) or 0 for name in ("prompt_tokens", "completion_tokens")]
    return Reply(choices, str(completion.model), *(min(max(0, int(count)), MAX_TOKENS) for count in tokens))


def _storable_text(text: str) -> str:
    """Remove zero bytes and replace lone surrogates, which parquet files and terminals can't represent."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()
