"""Read prompts for language models from YAML files, in which each prompt is a Jinja template.

The file captions/chat/translate.yaml explains the format. All templates are rendered once before any work, so that a
mistake in a file is reported at once.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment

from capivara_common.cli import read_yaml_config, unknown_name_message
from captions.languages import language_name

FOLDER = Path(__file__).parent
TRANSLATION_KEYS, CAPTION_KEYS = ("system", "user", "lines", "examples"), ("system", "prompts")
PROBE = "a cat on a mat 4711"  # test caption with which templates are rendered, to check that they contain the caption
# Jinja templates can run code. They run in a sandbox, because files of prompts can come from other people.
_ENVIRONMENT = SandboxedEnvironment(undefined=StrictUndefined)

# Compiled templates are cached, because each of them is rendered for many requests.
_compile_template = lru_cache(_ENVIRONMENT.from_string)

Message = dict[str, Any]  # a message of OpenAI's protocol, with the keys "role" and "content"


class Prompts:
    """Prompts for a language model, read from a YAML file of Jinja templates.

    Args:
        path: YAML file of prompts.
        keys: Keys that the file may have at the top level.
        languages: Languages that the templates can name, as a dict `{template variable: language code}`. For example,
            `{"language": "pt"}` defines the variables `language` ("Portuguese") and `language_code` ("pt").

    Attributes:
        content: Content of the file, as a dict. It is recorded with the settings of the output.

    Raises:
        ValueError: If the file is not valid, or a language has no English name.
    """

    def __init__(self, path: Path, keys: tuple[str, ...], languages: dict[str, str]):
        self.path, self.content = path, read_yaml_config(path)
        advice = f"Keys: {', '.join(keys)}."
        for key in self.content:
            if key not in keys:
                raise ValueError(unknown_name_message(str(key), f"key in {path}", list(keys), advice))
        self._variables = {name: language_name(code) for name, code in languages.items()}
        self._variables |= {f"{name}_code": code for name, code in languages.items()}
        self.system = [{"role": "system", "content": self.render("system")}] if self.content.get("system") else []

    def render(self, key: str, template: Any = None, **variables: str) -> str:
        """Render a template of the file: replace its variables by their values.

        Args:
            key: Key of the template in the file.
            template: Text of the template. Default: the value of `key` in the file. If that value is a list of
                templates, pass one of them.
            **variables: Values of template variables, for example `text`. The names of the languages are added to them.

        Returns:
            The text of the prompt.

        Raises:
            ValueError: If the template is missing or invalid, uses an unknown variable, or gives a blank text.
        """
        template = self.content.get(key) if template is None else template
        values = self._variables | variables
        try:
            if not isinstance(template, str):
                raise TypeError(
                    f"the template must be a text, got {template!r}; put a text that begins with {{{{ in quotes, "
                    "because YAML would read it as a mapping"
                )
            text = _compile_template(template).render(values).strip()
        except Exception as error:  # a template can raise errors of any type
            raise ValueError(
                f"{self.path}: `{key}` can't be rendered: {error}. Variables: {', '.join(values)}."
            ) from error
        if not text:
            raise ValueError(f"{self.path}: `{key}` must not be blank.")
        return text


class TranslationPrompts(Prompts):
    """Prompts that ask a language model to translate captions.

    Args:
        path: YAML file of prompts. None selects the file captions/chat/translate.yaml.
        language: Code of the target language.
        source_language: Code of the source language.
        needs_lines: True if one request will contain several captions, as numbered lines. The template `lines` is then
            checked, too.

    Raises:
        ValueError: If the file is not valid; for example, if the template `user` does not contain `{{ text }}`.
    """

    def __init__(self, path: Path | None, language: str, source_language: str, needs_lines: bool = False):
        languages = {"language": language, "source_language": source_language}
        super().__init__(path or FOLDER / "translate.yaml", TRANSLATION_KEYS, languages)
        self.examples = self.content.get("examples") or []
        if not isinstance(self.examples, list) or not all(map(_is_example, self.examples)):
            raise ValueError(f"{self.path}: `examples` must be a list of entries with the texts `text` and `answer`.")
        for key in ("user", "lines") if needs_lines else ("user",):
            if PROBE not in self.render(key, text=PROBE):
                raise ValueError(f"{self.path}: `{key}` must contain {{{{ text }}}}, where the caption is inserted.")

    def messages(self, text: str) -> list[Message]:
        """Build the conversation that asks the model to translate one caption.

        Args:
            text: The caption.

        Returns:
            Messages of OpenAI's protocol, as dicts with the keys "role" and "content".
        """
        return self._conversation("user", text, [(example["text"], example["answer"]) for example in self.examples])

    def line_messages(self, texts: list[str]) -> list[Message]:
        """Build the conversation that asks the model to translate several captions, as numbered lines.

        Args:
            texts: The captions.

        Returns:
            Messages of OpenAI's protocol, as dicts with the keys "role" and "content".
        """
        texts_and_answers = [[example[key] for example in self.examples] for key in ("text", "answer")]
        examples = [tuple(map(number_lines, texts_and_answers))] if self.examples else []
        return self._conversation("lines", number_lines(texts), examples)

    def _conversation(self, key: str, text: str, examples: list[tuple[str, ...]]) -> list[Message]:
        """Return the messages of a request: instructions, examples with their answers, and the text to translate.

        Args:
            key: Key of the template for the text and the examples: "user" or "lines".
            text: Text to translate.
            examples: Tuples (example text, answer).
        """
        messages = list(self.system)
        for example, answer in examples:
            messages.append({"role": "user", "content": self.render(key, text=example)})
            messages.append({"role": "assistant", "content": answer})
        return [*messages, {"role": "user", "content": self.render(key, text=text)}]


def _is_example(entry: Any) -> bool:
    """Return True if an entry of `examples` is a dict with the two texts `text` and `answer`."""
    has_keys = isinstance(entry, dict) and entry.keys() == {"text", "answer"}
    return has_keys and all(isinstance(text, str) for text in entry.values())


def number_lines(texts: list[str]) -> str:
    """Join texts to numbered lines, such as "1. a cat", so that one request can contain all of them.

    Line breaks within a text become blanks.
    """
    return "\n".join(f"{number}. {' '.join(text.split())}" for number, text in enumerate(texts, 1))


class CaptionPrompts(Prompts):
    """Prompts that ask a vision-language model for captions of an image.

    Args:
        path: YAML file of prompts. Default: captions/chat/captions_<language>.yaml if it exists, otherwise
            captions_en.yaml.
        language: Code of the language of the captions.

    Attributes:
        prompts: Texts of the prompts. Each image is sent once with each prompt.

    Raises:
        ValueError: If the file is not valid, or two prompts are equal.
    """

    def __init__(self, path: Path | None, language: str):
        built_in = FOLDER / f"captions_{language}.yaml"
        path = path or (built_in if built_in.is_file() else FOLDER / "captions_en.yaml")
        super().__init__(path, CAPTION_KEYS, {"language": language})
        templates = self.content.get("prompts")
        if not isinstance(templates, list) or not templates:
            raise ValueError(f"{self.path}: `prompts` must be a list with at least one prompt.")
        self.prompts = [self.render("prompts", template) for template in templates]
        if len(set(self.prompts)) < len(self.prompts):
            raise ValueError(f"{self.path}: `prompts` must not contain the same prompt twice.")

    def messages(self, number: int, image_url: str | None) -> list[Message]:
        """Build the conversation that asks the model for a caption of an image.

        Args:
            number: Index of the prompt in `prompts`.
            image_url: The image as a data URL. None: build the same conversation without an image.

        Returns:
            Messages of OpenAI's protocol, as dicts with the keys "role" and "content".
        """
        image = [{"type": "image_url", "image_url": {"url": image_url}}] if image_url is not None else []
        text = {"type": "text", "text": self.prompts[number]}
        return [*self.system, {"role": "user", "content": [*image, text]}]
