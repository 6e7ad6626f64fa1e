"""Translate sentences with a language model on a server that speaks OpenAI's protocol (`--backend chat`).

By default, each request contains one sentence. With `--captions_per_request`, a request contains several sentences as
numbered lines. If the answer has a different number of lines, these sentences are translated one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from capivara_common.cli import check_at_least, flag
from captions.chat.answers import Answer, Choice, clean_answer, detect_refusal_or_truncation, extract_numbered_lines
from captions.chat.client import ChatClient
from captions.chat.flags import CHAT, ChatBackend, ChatFlags, check_chat_flags, get_settings_that_change_answers
from captions.chat.prompts import TranslationPrompts
from captions.quality import REFUSED, TRUNCATED, find_translation_quality_flags
from captions.sentences import iter_distinct_captions
from captions.stages import RowStage
from captions.translators.base import Translator, split_text

MAX_PIECE_CHARACTERS = 2_000  # longer sentences are split, so that each answer fits into `max_tokens`
LETTERS_PER_TOKEN = 4  # rule of thumb with which a dry run estimates token counts
SINGLE, LINES = "translation", "translations"  # keys of JSON answers with one translation, and with several
# Faults with which an answer is dropped. Answers with other faults are kept, and listed in the column of quality flags.
UNUSABLE = (REFUSED, TRUNCATED)


@dataclass(kw_only=True)
class ChatTranslatorFlags(ChatFlags):
    """Flags of the backend that translates with a language model on a server (`--backend chat`)."""

    captions_per_request: int = flag(
        1, "Captions to translate per request. If there are several, they are sent as numbered lines.", group=CHAT
    )


class ChatTranslator(ChatBackend, Translator):
    """Translator that sends sentences to a language model on a server, and receives translations.

    Args:
        args: Flags of `captions.translate`.
        stage: Access to the rows whose captions are translated. None: only check whether the servers can be used, with
            fewer attempts per request.

    Raises:
        ValueError: If a flag or the file of prompts is invalid, or the server refuses requests.
        ConnectionError: If the server can't be reached.
    """

    flags = ChatTranslatorFlags
    counts_tokens = True

    def __init__(self, args: Any, stage: RowStage | None):
        self._args, self._prompts = args, _read_translation_prompts(args)
        self._client = ChatClient(args, stage.rank if stage else 0)
        self._client.connect(self._prompts.messages("a cat"), is_check=stage is None)
        self.name = self._client.model
        self.fingerprint = {
            "backend": "chat",
            "model": self._client.model,
            "source": args.source_language,
            "target": args.language,
            "prompts": self._prompts.content,
            "captions_per_request": args.captions_per_request,
            **get_settings_that_change_answers(args),
        }

    @classmethod
    def check_flags(cls, args: Any) -> None:
        """Check the flags and the file of prompts for the model, without network access.

        Raises ValueError if a flag or the file is invalid, and ImportError if a package is missing.
        """
        check_chat_flags(args, "--backend chat")
        check_at_least(args, 1, "captions_per_request")
        if args.model is None:
            raise ValueError("--backend chat requires --model, the name of the model on the server.")
        _read_translation_prompts(args)

    @classmethod
    def describe_work(cls, args: Any, stage: RowStage) -> list[str]:
        """Estimate how many requests and tokens the translation needs on the server. A dry run prints this estimate.

        Args:
            args: Flags of `captions.translate`.
            stage: Access to the rows whose captions are translated.

        Returns:
            Two lines of text: the number of distinct captions, and the estimated numbers of requests and tokens.
        """
        prompts, size = _read_translation_prompts(args), args.captions_per_request
        sentences = list(iter_distinct_captions(args, stage.source))
        characters, requests = sum(map(len, sentences)), -(-len(sentences) // size)
        overhead = len(str(prompts.messages("a") if size == 1 else prompts.line_messages(["a"])))
        read, written = ((requests * overhead + characters) // LETTERS_PER_TOKEN, characters // LETTERS_PER_TOKEN)
        estimate = f"about {requests:,} requests, {read:,} tokens read and {written:,} written"
        return [f"{len(sentences):,} distinct captions", estimate]

    def describe_usage(self) -> str:
        """Return a note for the progress bar: tokens per second, and the cost so far.

        The cost is shown only if the flag `price_per_million` is set.
        """
        return self._client.describe_usage()

    def translate(self, sentences: list[str]) -> list[str]:
        """Translate sentences with the model on the server, and return one translation per sentence, in order.

        If the model gives no usable answer for a sentence, its translation is "". Each answer is also passed to
        `on_answer`, with the problem in its attribute `fault`.

        Args:
            sentences: Sentences to translate.
        """
        size = self._args.captions_per_request
        groups = [sentences[start : start + size] for start in range(0, len(sentences), size)]
        return [answer.text for answers in self._client.map(self._translate_group, groups) for answer in answers]

    async def _translate_group(self, sentences: Sequence[str]) -> list[Answer]:
        """Translate a group of sentences, in one request if possible, and pass each answer to `on_answer`.

        Sentences whose line is bad or missing are translated one by one.
        """
        lines, cost = [""] * len(sentences), Answer("")
        if len(sentences) > 1 and max(map(len, sentences)) <= MAX_PIECE_CHARACTERS:
            lines, cost = await self._request_lines(sentences)
        answers = []
        for sentence, line in zip(sentences, lines, strict=True):
            text, fault = self._judge_text(sentence, line, Choice(line))
            answers.append(Answer(text) if fault is None else await self._translate_sentence(sentence))
        answers[0] = answers[0].with_cost_of(cost)
        for sentence, answer in zip(sentences, answers, strict=True):
            self.on_answer(sentence, answer)
        return answers

    async def _request_lines(self, sentences: Sequence[str]) -> tuple[list[str], Answer]:
        """Request the translations of sentences as numbered lines of one answer.

        Returns:
            A tuple (lines, cost). `lines` has one text per sentence. All texts are "" if the model wrote another number
            of lines. `cost` is an answer without text that holds the tokens of the request.
        """
        lines: list[str] = []

        def judge(choice: Choice, value: object) -> tuple[str, str | None]:
            found = value if isinstance(value, list) else extract_numbered_lines(choice.text, len(sentences))
            lines[:] = map(str, found) if found is not None and len(found) == len(sentences) else []
            return "", None if lines else TRUNCATED

        messages = self._prompts.line_messages(list(sentences))
        (cost,) = await self._client.ask(messages, judge, LINES, text_count=len(sentences))
        return lines or [""] * len(sentences), cost

    async def _translate_sentence(self, sentence: str) -> Answer:
        """Translate one sentence. A sentence longer than `MAX_PIECE_CHARACTERS` is translated in pieces."""
        answer = Answer("")
        for piece in split_text(sentence, lambda text: len(text) <= MAX_PIECE_CHARACTERS):

            def judge(choice: Choice, value: object, piece: str = piece) -> tuple[str, str | None]:
                return self._judge_text(piece, value if isinstance(value, str) else choice.text, choice)

            (part,) = await self._client.ask(self._prompts.messages(piece), judge, SINGLE)
            # Ignore faults that leave a usable text, such as a wrong script. `captions.translate` checks the texts of
            # all translators for such faults later.
            fault = part.fault if part.fault in UNUSABLE else None
            text = f"{answer.text} {part.text}".strip()
            answer = replace(part.with_cost_of(answer), text=text, fault=answer.fault or fault)
        return answer if answer.fault is None else replace(answer, text="")

    def _judge_text(self, sentence: str, text: str, choice: Choice) -> tuple[str, str | None]:
        """Return the tuple (cleaned translation, first fault) for an answer; the fault is None if none was found.

        A fault is the name of a problem, such as "refused".

        Args:
            sentence: Sentence that was translated.
            text: Text of the answer.
            choice: The complete answer of the model, which also says why the model stopped.
        """
        text = clean_answer(text, sentence)
        fault = detect_refusal_or_truncation(text, choice, sentence)
        return text, fault or next(iter(find_translation_quality_flags(sentence, text, self._args.language)), None)


def _read_translation_prompts(args: Any) -> TranslationPrompts:
    """Read the file of prompts that the flags of `captions.translate` name.

    Raises ValueError if the file is not valid, or a language has no name.
    """
    return TranslationPrompts(args.prompts, args.language, args.source_language, args.captions_per_request > 1)
