"""Find and hide text that must not be published or logged: access tokens, keys and absolute paths of this machine.

All packages of the project use these functions: for error messages, for files that record a run, for model and dataset
cards, and for the checks before an upload to the Hub.
"""

import mmap
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

# {prefix of a secret: regular expression for the characters after the prefix}. The expressions must be valid both in
# Python's `re` and in the library RE2, with which Arrow searches the columns of parquet files.
_TOKEN_PATTERNS = {
    "hf_": r"(?:oauth_[\w.-]{20,}|jwt_[\w.-]{20,}|[A-Za-z0-9]{20,})",
    "api_org_": r"[A-Za-z0-9]{16,}",
    **{f"gh{kind}_": r"\w{20,}" for kind in "pousr"},
    "github_pat_": r"\w{20,}",
    "AKIA": r"[A-Z0-9]{16}\b",
    "ASIA": r"[A-Z0-9]{16}\b",
    "AIza": r"[\w-]{35}",
    "GOCSPX-": r"[\w-]{28}",
    "ya29.": r"[\w-]{20,}",
}
# Secrets that are recognized by the name of an AWS key or by the header of a PEM file. In contrast to the tokens above,
# any character may precede the name or header.
_AWS_KEY_NAMES = """aws_secret_access_key AWS_SECRET_ACCESS_KEY aws_secret_key AWS_SECRET_KEY
          SecretAccessKey secretAccessKey secret_access_key SECRET_ACCESS_KEY"""
_LABELED_SECRET_PATTERNS = {
    **dict.fromkeys(_AWS_KEY_NAMES.split(), r"\\?[\"']?\s*[=:>]\s*\\?[\"']?[\w/+]{40}"),
    "-----BEGIN ": r"(?:[A-Z0-9]+ )*PRIVATE KEY",
}
_SECRET_PREFIXES = [*_TOKEN_PATTERNS, *_LABELED_SECRET_PATTERNS]
_ESCAPED_UNDERSCORES = (r"\u005f", r"\u005F", "%5f", "%5F")  # spellings of "_" in JSON and in URLs
_ESCAPED = "|".join(map(re.escape, _ESCAPED_UNDERSCORES))
_TOKEN_PATTERN, _LABELED_SECRET_PATTERN = (
    "|".join(re.escape(start) + rest for start, rest in forms.items())
    .replace("_", f"(?:_|{_ESCAPED})")
    .replace(r"\w{20,}", rf"(?:\w|{_ESCAPED}){{20,}}")
    for forms in (_TOKEN_PATTERNS, _LABELED_SECRET_PATTERNS)
)
# A token must not follow a letter or digit, because it would then be part of a longer word. Letters and digits of an
# escape sequence are allowed: `\n` or `\u201c` in JSON, `%3D` in a URL.
SECRET_RE2 = (
    rf"(?:^|[^A-Za-z0-9]|\\[bfnrt]|\\u[0-9A-Fa-f]{{4}}|%[0-9A-Fa-f]{{2}})(?:{_TOKEN_PATTERN})|{_LABELED_SECRET_PATTERN}"
)
_WORD_START = r"(?:(?<![A-Za-z0-9])|(?<=\\[bfnrt])|(?<=\\u[0-9A-Fa-f]{4})|(?<=%[0-9A-Fa-f]{2}))"
SECRET_RE = re.compile(rf"{_WORD_START}(?:{_TOKEN_PATTERN})|{_LABELED_SECRET_PATTERN}", re.ASCII)
_SECRET_BYTES_RE = re.compile(SECRET_RE.pattern.encode())
# Secrets in URLs and HTTP headers. They are searched for only in logs and messages, because they occur only there. A
# password in a URL may contain slashes.
_USER_INFO = re.compile(r"(?<=://)(?:[^\s?#@/:]{0,300}:\S{0,300}|[^/\s]+)(?=@)")
_SECRET_CHARACTER = r"""[^\s"'&,;]"""
# The word after "bearer" or "basic" is a secret only if it looks random; "basic Portuguese" is not a secret. A word
# looks random in two cases. Either it has at least 16 characters, and a capital, a digit or "=" directly follows a
# small letter or a digit. Or it has at least 8 characters, with both letters and digits.
_LOOKS_RANDOM = (
    rf"(?:(?={_SECRET_CHARACTER}{{16}})(?={_SECRET_CHARACTER}{{0,200}}[a-z0-9][A-Z0-9=])"
    rf"|(?={_SECRET_CHARACTER}{{8}})(?={_SECRET_CHARACTER}{{0,200}}[0-9])(?={_SECRET_CHARACTER}{{0,200}}[A-Za-z]))"
)
# Group 1 matches the text before a secret, for example "Authorization: Bearer ". The secret follows group 1.
_REQUEST_SECRET_RE = re.compile(
    r"""((?i:\bauthorization\\?["']?\s*[:=]\s*\\?["']?(?:(?:aws4-[\w-]+|[a-z]+)\s+)?)"""
    rf"""|\b(?i:bearer|basic)(?:\s+|%20|:\s*){_LOOKS_RANDOM}"""
    r"""|(?i:(?:secret[_-]?(?:access[_-]?)?key|session[_-]?token)\\?["']?\s*[:=]\s*\\?["']?)"""
    r"""|(?<![A-Za-z0-9])(?i:x-(?:amz|goog)-(?:signature|credential|security-token))(?i:=|%3d|["']?:\s*["']?)"""
    r"""|(?<![A-Za-z0-9])(?i:sig|signature|credential|access_token)(?i:=\\?["']?|%3d|["']:\s*["']?)"""
    rf"""|(?<=[?&])(?i:token)=){_SECRET_CHARACTER}+"""
)

_NAME_CHARACTER = r"[^\s\"'`<>|;,)\]}:/\\]"  # a character that may belong to a file name within a text
_PATH_TAIL = rf"(?:{_NAME_CHARACTER}|[/\\]|:(?!/))*"
_NONEMPTY_PATH_TAIL = _NAME_CHARACTER + _PATH_TAIL
# Texts that contain slashes but are not paths: `_URL_PATTERNS` matches URLs and inline Base64 images, `_SITE_PATH`
# matches HTTP routes and links to pages of the Hub.
_URL_PATTERNS = (
    r"(?<![\w+.-])(?!(?i:file):)[A-Za-z][\w+.-]{0,30}://[^\s/](?:(?!::)[^\s\"'<>`|;,)\]}])*",
    r";base64,[A-Za-z0-9+/]{60,}",
)
_HUB_PAGES = "blog|collections|datasets|docs|join|models|organizations|papers|pricing|spaces|tasks"
_SITE_PATH = (
    r"(?:\b(?:GET|HEAD|POST|PUT|PATCH|DELETE) (?=/)"
    rf"|(?:\]\(|(?:href|src)=\\?[\"']?)(?=/(?:{_HUB_PAGES})[/)\"']))(?!\S{{0,400}}/\.\.)"
)
# Characters that may precede a path in a text. A letter, a dot or a slash may not, because the text after it would be
# part of a longer name. Markdown signs such as `*` are not in this set either, because they also occur within glob
# patterns (`data/**/x`). `_PATH_START` accepts a Markdown sign before a path only if it is at the beginning of a word.
_BOUNDARY_CHARACTERS = r"""\s"'`“”‘’«=:(\[{<>,;|!@&–—→·"""
_PATH_START = (
    rf"(?:(?<=://)|(?<=:///)|(?<![^{_BOUNDARY_CHARACTERS}])|"
    + "|".join(
        rf"(?<={start}{sign})" for start in (r"\A", r"[\s(\[]") for sign in (r"\*", r"\*\*", "_", "__", "#", "…")
    )
    + ")"
)
_FOLDER_PATTERN = r"(?=[\d/._~+-]*[^\W\d_])[\w.@+%~-]+/"  # must have a letter, so 1/2 doesn't match
_HOST_PATTERN = r"[A-Za-z0-9][\w.$-]+"
# Public host in a URL without a scheme, as in `//cdn.example.org/x`. Such a URL is not a path.
_DOMAIN_PATTERN = r"[\w-]+(?:\.[\w-]+)*\.(?!local/|lan/|home/|internal/)[A-Za-z]{2,}/"
_PATH_PATTERNS = (
    rf"{_PATH_START}/(?!path/to\b(?!\S{{0,200}}/\.\.)|dev/null\b){_FOLDER_PATTERN}{_NONEMPTY_PATH_TAIL}",
    r"(?<=[\"'`])/[A-Za-z][\w.-]+/?(?=[\"'`])",
    rf"(?:{_PATH_START}(?<!:)//++|(?<=[Ff]ile:)//)(?!{_DOMAIN_PATTERN}){_FOLDER_PATTERN}{_NONEMPTY_PATH_TAIL}",
    # UNC paths such as \\host\share, also with escaped backslashes
    rf"(?<![\w\\])(?:\\{{2}}{_HOST_PATTERN}\\(?!\\)|\\{{4}}{_HOST_PATTERN}\\{{2}}(?!\\))[\w$~](?:{_NAME_CHARACTER}|[/\\])*",
    rf"(?<!\w)[A-Za-z]:(?:\\{{1,2}}|/){_NAME_CHARACTER}+(?:\\{{1,2}}|/){_NAME_CHARACTER}(?:{_NAME_CHARACTER}|[/\\])*",
)
_ABSOLUTE_START = rf"/[^\s/]|(?<!:)//[\w-]+/|\\{{2}}{_HOST_PATTERN}\\(?!\\)|[A-Za-z]:[\\/][^\\/\n]"
# Matches a text that is a path as a whole. Group 1 is what may precede the path, such as `--flag=`.
_WHOLE_PATH_RE = re.compile(rf"((?:[\w-]+[=:])*)((?:{_ABSOLUTE_START})[^\n]*)")
# Characters that a terminal executes or hides: control and format characters, line separators, and lone surrogates
# (bytes of a file name that is not valid UTF-8). Format characters that names need are not included: joiners (in
# Arabic, Indic scripts and emoji) and Arabic number signs.
UNSAFE_CHARACTER_RE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f]"
)


def find_secret(content: str | bytes | mmap.mmap) -> tuple[str, int] | None:
    """Search a text or a file that will be published for a secret, such as an access token or a private key.

    Args:
        content: Text, bytes or memory-mapped file to search.

    Returns:
        None if there is no secret. Otherwise the tuple (kind of secret, position) of one secret, not necessarily the
        first. The kind is a text without the secret itself. The position is an offset in characters for a text,
        otherwise in bytes.
    """
    encode = str if isinstance(content, str) else str.encode
    for token in read_hub_tokens():
        if (position := content.find(encode(token))) >= 0:
            return "a token of this machine", position
    secret_pattern = SECRET_RE if encode is str else _SECRET_BYTES_RE
    for prefix in _SECRET_PREFIXES:
        for position in _find_substring_positions(content, encode(prefix)):
            if secret_pattern.match(content, position):
                return f"what looks like an access token or key ({prefix}…)", position
    for escape in _ESCAPED_UNDERSCORES:
        for position in _find_substring_positions(content, encode(escape)):
            # The search starts 30 characters before the escaped "_", because the secret may begin before this "_".
            if match := secret_pattern.search(content, max(0, position - 30), position + 300):
                return f"what looks like an access token or key (with {escape})", match.start()
    return None


def _find_substring_positions(content: str | bytes | mmap.mmap, part: str | bytes) -> Iterator[int]:
    """Yield the positions of all occurrences of `part` in `content`, in ascending order."""
    position = content.find(part)
    while position >= 0:
        yield position
        position = content.find(part, position + 1)


def redact_secrets(text: str) -> str:
    """Replace the secrets in a text by `***`, so that the text can be logged.

    Secrets are the Hub tokens of this machine, any text that looks like a key or a token, and passwords in URLs. Hub
    tokens (`hf_…`) become `hf_***`.
    """
    for secret in read_hub_tokens():
        text = text.replace(secret, "hf_***")
    text = SECRET_RE.sub(lambda match: "hf_***" if match[0].startswith("hf_") else "***", text)
    return _REQUEST_SECRET_RE.sub(r"\1***", _USER_INFO.sub("***", text))


def escape_control_characters(text: str) -> str:
    r"""Escape all characters that could control the terminal or be invisible in it, including line breaks.

    For example, the escape character, with which terminal commands begin, becomes the text `\x1b`.
    """
    # Python represents a byte 0xXX of a file name that is not valid UTF-8 by the surrogate \udcXX. It is shown as \xXX.
    return UNSAFE_CHARACTER_RE.sub(
        lambda match: match[0].encode("unicode_escape").decode().replace("\\udc", "\\x"), text
    )


def make_printable(text: str) -> str:
    """Make a text from an untrusted source safe to print: hide secrets, and escape control characters.

    Line breaks stay as they are.
    """
    return "\n".join(map(escape_control_characters, redact_secrets(text).split("\n")))


def read_hub_tokens() -> list[str]:
    """Return the Hugging Face access tokens that this machine stores, so that they can be recognized in texts.

    Tokens are read from the environment variables HF_TOKEN and HUGGING_FACE_HUB_TOKEN, and from the token file of
    huggingface_hub. Texts of fewer than 8 characters are left out.
    """
    from huggingface_hub import constants  # imported here because `capivara --help` must not load huggingface_hub

    tokens = [os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")]
    with suppress(OSError, ValueError):
        tokens.append(Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8"))
    return [token.strip() for token in tokens if len(token.strip()) >= 8]


def find_machine_path(text: str) -> str | None:
    """Find the first absolute path in a text, which could reveal private folder names if the text is published.

    URLs, Hub ids, fractions and dates are not mistaken for paths.

    Returns:
        The path. None if the text contains no absolute path.
    """
    return next((match[0] for match in _compile_path_pattern().finditer(text) if match["path"]), None)


def shorten_absolute_paths(value: Any) -> Any:
    """Shorten all absolute paths in a text or JSON value, so that it can be published without private folder names.

    A path inside the current folder becomes relative to it. Any other path is reduced to its last part.

    Args:
        value: A text, or a JSON value that contains texts. Paths in the keys of objects are shortened, too.

    Returns:
        A value of the same structure with shortened paths.

    Raises:
        ValueError: If two keys of an object are equal after their paths are shortened.
    """
    if isinstance(value, dict):
        cleaned = {shorten_absolute_paths(key): shorten_absolute_paths(item) for key, item in value.items()}
        if len(cleaned) < len(value):
            raise ValueError(f"These keys differ only in their folders: {sorted(value)}. Rename one of them.")
        return cleaned
    if isinstance(value, list):
        return [shorten_absolute_paths(item) for item in value]
    if not isinstance(value, str) or not ("/" in value or "\\" in value):
        return value
    if whole := _WHOLE_PATH_RE.fullmatch(value):  # if the whole text is a path, the path may contain spaces
        return whole[1] + _shorten_absolute_path(whole[2])
    return _compile_path_pattern().sub(
        lambda match: _shorten_absolute_path(match[0]) if match["path"] else match[0], value
    )


def get_publishable_model_or_dataset_name(name: str) -> str:
    """Return the name of a model or dataset without private folders, so that it can appear in published files.

    Args:
        name: Hub id or local path.

    Returns:
        A Hub id stays unchanged. A path inside the current folder becomes relative, with at most its last two parts.
        Any other path is reduced to its last part.
    """
    is_local = name.startswith(("/", "~", "\\\\")) or ".." in Path(name).parts or Path(name).exists()
    return "/".join(PurePosixPath(_shorten_absolute_path(name) if is_local else name).parts[-2:]) or "."


def list_private_folders() -> list[str]:
    """List the folders of this machine that published files must not mention.

    These are the home folder, the current folder, the folder for temporary files, the folder of the Python environment,
    and the folder that contains the code of this project.

    Returns:
        Absolute paths, the longest path first.
    """
    checkout = Path(__file__).resolve().parents[1]
    folders = {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), Path(sys.prefix), checkout}
    return sorted({str(folder) for folder in folders if len(folder.parts) > 1}, key=len, reverse=True)


def _compile_path_pattern() -> re.Pattern[str]:
    """Compile a regular expression that finds absolute paths in a text.

    It also matches URLs and other texts with slashes as a whole, so that their ends are not mistaken for paths. The
    group `path` matches only if an absolute path was found.
    """
    # A path has at least two parts (`/folder/file`), is in quotes (`"/folder"`), or begins with a private folder.
    local_folder = rf"(?:{'|'.join(map(re.escape, list_private_folders()))})(?![\w.-])"
    site_path = rf"{_SITE_PATH}(?!{local_folder})[^\s\"'<>`|;,)\]]*"
    path = rf"(?P<path>{_PATH_START}{local_folder}{_PATH_TAIL}|{'|'.join(_PATH_PATTERNS)})"
    return re.compile(rf"{'|'.join(_URL_PATTERNS)}|{site_path}|{path}")


def _shorten_absolute_path(path: str) -> str:
    """Return a path relative to the current folder; only its last part if the path lies outside the current folder."""
    current = Path.cwd()
    target = Path(os.path.normpath(current / path))
    # If the current folder contains the home folder, such as `/`, relative paths would show the user's name.
    is_inside = target.is_relative_to(current) and current not in Path.home().parents
    if is_inside and not re.match(r"~|\\\\|[A-Za-z]:[\\/]", path):
        return target.relative_to(current).as_posix()
    # The folders above may be named after a person.
    return re.split(r"[\\/]+", path.rstrip("\\/"))[-1]
