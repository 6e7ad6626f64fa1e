"""Clean the answers of language models, and find answers that can't be used.

A model that is asked for a caption or a translation often adds other text. `clean_answer` removes it, and
`detect_refusal_or_truncation` finds answers that the model refused or did not finish. `captions.quality` finds other
problems, such as a text in the wrong script.
"""

import json
import re
from dataclasses import dataclass, replace

from captions.quality import REFUSED, TRUNCATED

REASONING = r"think|thinking|thought|reasoning|reflection"
REASONING_RE = re.compile(rf"<({REASONING})>.*?</\1>|\[THINK\].*?\[/THINK\]", re.IGNORECASE | re.DOTALL)
REASONING_END_RE = re.compile(rf"^.*(?:</(?:{REASONING})>|\[/THINK\])", re.IGNORECASE | re.DOTALL)
REASONING_START_RE = re.compile(rf"(?:<(?:{REASONING})>|\[THINK\]).*$", re.IGNORECASE | re.DOTALL)
SPECIAL_TOKEN_RE = re.compile(r"<\|[\w ]+\|>|</?s>|<(?:start|end)_of_turn>|<(?:eos|pad|bos)>")
FENCE_RE = re.compile(r"```[\w-]*[ \t]*\n?(.*?)(?:```|$)", re.DOTALL)
# Introductions such as "Sure! Here is the translation in Portuguese:". The number of characters before the colon is
# limited, so that a long caption with a colon is not taken for an introduction.
_RESULT = r"(?:translation|translated (?:text|caption)|caption|tradução|legenda|traducción)s?"
INTRODUCTION_RE = re.compile(
    r"^\W*(?:(?:sure|certainly|of course|okay|claro|com certeza|por supuesto)\b[^:\n]{0,80}"
    rf"|(?:here|aqui|aquí)\b[^:\n]{{0,60}}\b{_RESULT}\b[^:\n]{{0,40}}"
    rf"|(?:the |a )?{_RESULT}\b(?: (?:in|into|to|of|em|para|da|do)\b[^:\n]{{0,40}})?)(?:\*\*)?:(?:\*\*)?\s*",
    re.IGNORECASE,
)
NOTE_RE = re.compile(
    r"\n\s*[(\[*_]*(?:note|notes|nota|notas|observação|obs|explanation|explicação)\b\**:.*$", re.IGNORECASE | re.DOTALL
)
QUOTES = ('""', "“”", "„“", "«»", "‘’", "「」", "『』", "''", "``")  # pairs of a left and a right quote
# Beginnings of refusals in English, Portuguese and Spanish. Models often refuse in English, even if the request is in
# another language.
REFUSAL_RE = re.compile(
    r"^\W*(?:(?:i['’]?m|i am|we are) (?:really |very |so )?sorry\b|sorry, (?:but )?i\b|i apologi[sz]e\b"
    r"|(?:unfortunately,? )?i (?:can(?:['’]t|not| not)|won['’]t|am (?:unable|not able)|do not have the ability)\b"
    r"|i['’]m (?:unable|not able)\b|as an? (?:ai|language model)\b"
    r"|(?:desculpe|sinto muito|lamento|infelizmente),? (?:mas |eu )*(?:não|sou)\b"
    r"|não (?:posso|consigo) (?:ajudar|atender|ver|traduzir)\b"
    r"|como (?:uma? )?(?:ia|modelo de linguagem|inteligência artificial)\b|lo siento,? (?:pero )?no\b)",
    re.IGNORECASE,
)
LINE_RE = re.compile(r"^\s*(\d+)\s*[.):\]-]\s*(.*\S)\s*$")


# Fields of `Answer` whose sums over all answers are written to quality.json.
USAGE_FIELDS = ("retried", "prompt_tokens", "completion_tokens")


@dataclass(frozen=True)
class Choice:
    """One of the answers that a server returns for a request; OpenAI's protocol calls it a choice.

    Attributes:
        text: Content of the answer.
        finish_reason: Why the model stopped, for example "stop" or "length".
        refusal: Explanation of a refusal, if the server states one.
    """

    text: str
    finish_reason: str | None = None
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One caption or translation that a language model has written, with its problem and its numbers of tokens.

    Attributes:
        text: The text after cleaning. If `fault` is set, the text may be empty or unusable.
        fault: What is wrong with the answer, for example "refused" or "truncated". None if no problem was found.
        prompt_tokens: Number of tokens that the model has read.
        completion_tokens: Number of tokens that the model has written.
        retried: True if the request was sent twice, because the first answer was unusable.
    """

    text: str
    fault: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retried: bool = False

    def with_cost_of(self, other: "Answer") -> "Answer":
        """Return a copy of this answer that also counts the tokens of another answer, such as a discarded one.

        In the copy, `retried` is True if it is True in either answer.

        Args:
            other: The answer that is not kept.
        """
        tokens = {name: getattr(self, name) + getattr(other, name) for name in ("prompt_tokens", "completion_tokens")}
        return replace(self, retried=self.retried or other.retried, **tokens)


def clean_answer(text: str, source: str = "") -> str:
    """Return only the caption or translation from an answer of a language model, as one line.

    Reasoning, introductions such as "Here is the translation:", notes and surrounding quotes are removed.

    Args:
        text: Content of the answer.
        source: Sentence that was translated. If it begins with a quote or an introduction, the translation keeps it.
    """
    text = _remove_reasoning_and_special_tokens(text)
    if fence := FENCE_RE.search(text):
        text = fence[1]  # keep only the text inside the first code fence
    text = text.strip()
    if not INTRODUCTION_RE.match(source):
        text = INTRODUCTION_RE.sub("", text, count=1)
    text = NOTE_RE.sub("", text).strip()
    previous = None
    while previous != text:
        previous = text
        if re.fullmatch(r"\*\*[^*]+\*\*", text):
            text = text[2:-2].strip()
        if not any(source.strip().startswith(left) for left, _ in QUOTES):
            text = _remove_surrounding_quotes(text)
    return " ".join(text.split())


def _remove_reasoning_and_special_tokens(text: str) -> str:
    """Remove reasoning and special tokens from an answer."""
    text = REASONING_RE.sub("", text)
    # The opening or the closing tag may be missing.
    text = REASONING_START_RE.sub("", REASONING_END_RE.sub("", text))
    return SPECIAL_TOKEN_RE.sub("", text)


def _remove_surrounding_quotes(text: str) -> str:
    """Remove a pair of quotes around a text, if the text has no such quotes inside."""
    for left, right in QUOTES:
        inner = text[len(left) : -len(right)]
        if len(text) > 2 and text == left + inner + right and left not in inner and right not in inner:
            return inner.strip()
    return text


def detect_refusal_or_truncation(text: str, choice: Choice, source: str = "") -> str | None:
    """Detect whether an answer of a language model is a refusal or unfinished.

    Args:
        text: The answer after cleaning.
        choice: The complete answer, as the server has sent it.
        source: Sentence that was translated. If it looks like a refusal itself ("I can't …"), its translation may, too.

    Returns:
        "refused" if the model or a content filter refused the request, "truncated" if the answer ended at the token
        limit, otherwise None.
    """
    if choice.refusal or choice.finish_reason == "content_filter":
        return REFUSED
    if choice.finish_reason == "length":
        return TRUNCATED
    return REFUSED if REFUSAL_RE.match(text) and not REFUSAL_RE.match(source) else None


def extract_numbered_lines(text: str, count: int) -> list[str] | None:
    """Read the texts from an answer that consists of numbered lines, such as "1. um gato".

    Args:
        text: Content of the answer. Lines without a number are ignored.
        count: Number of lines that were requested.

    Returns:
        The texts without their numbers, in the order of the numbers. None if the numbers are not exactly 1 to `count`.
    """
    answer_lines = _remove_reasoning_and_special_tokens(text).splitlines()
    matches = list(filter(None, map(LINE_RE.match, answer_lines)))
    lines = {int(match[1]): match[2] for match in matches}
    is_complete = len(matches) == count and lines.keys() == set(range(1, count + 1))
    return [lines[number] for number in range(1, count + 1)] if is_complete else None


def extract_value_from_json_answer(text: str, name: str) -> object:
    """Read one value from an answer of a language model that should be a JSON object.

    Args:
        text: Content of the answer. Reasoning and code fences around the JSON object are ignored.
        name: Key of the value.

    Returns:
        The value. None if the answer is not a JSON object with this key.
    """
    text = _remove_reasoning_and_special_tokens(text).strip()
    fence = FENCE_RE.search(text)
    try:
        content = json.loads(fence[1] if fence else text)
    except ValueError:  # some servers ignore the requested JSON schema
        return None
    return content.get(name) if isinstance(content, dict) else None


def build_json_response_format(name: str, count: int | None = None) -> dict[str, object]:
    """Build the request parameter `response_format`, which requires an answer that is a JSON object with one key.

    Args:
        name: The key, for example "translation".
        count: None: the value of the key is a text. A number: the value is a list of this many texts.

    Returns:
        A dict with a JSON schema.
    """
    value: dict[str, object] = {"type": "string"}
    if count is not None:
        value = {"type": "array", "items": value, "minItems": count, "maxItems": count}
    schema = {"type": "object", "properties": {name: value}, "required": [name], "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}
