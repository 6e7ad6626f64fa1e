"""What must not be published, decided here alone: how secrets look, and how a place is named without its machine."""

import mmap
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

# How a secret begins -> how it goes on. The forms are of both `re` and RE2, which searches columns of parquet files.
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
# These say what they are, whatever stands before them.
_AWS_KEY_NAMES = """aws_secret_access_key AWS_SECRET_ACCESS_KEY aws_secret_key AWS_SECRET_KEY SecretAccessKey secretAccessKey
          secret_access_key SECRET_ACCESS_KEY"""
_LABELED_SECRET_PATTERNS = {
    **dict.fromkeys(_AWS_KEY_NAMES.split(), r"\\?[\"']?\s*[=:>]\s*\\?[\"']?[\w/+]{40}"),
    "-----BEGIN ": r"(?:[A-Z0-9]+ )*PRIVATE KEY",
}
_SECRET_PREFIXES = [*_TOKEN_PATTERNS, *_LABELED_SECRET_PATTERNS]
_ESCAPED_UNDERSCORES = (r"\u005f", r"\u005F", "%5f", "%5F")  # of JSON, of addresses
_ESCAPED = "|".join(map(re.escape, _ESCAPED_UNDERSCORES))
_TOKEN_PATTERN, _LABELED_SECRET_PATTERN = (
    "|".join(re.escape(start) + rest for start, rest in forms.items())
    .replace("_", f"(?:_|{_ESCAPED})")
    .replace(r"\w{20,}", rf"(?:\w|{_ESCAPED}){{20,}}")
    for forms in (_TOKEN_PATTERNS, _LABELED_SECRET_PATTERNS)
)
# No letter stands before the others, but for the last one of an escape: `\n` and `\u201c` of JSON, `%3D` of addresses.
SECRET_RE2 = (
    rf"(?:^|[^A-Za-z0-9]|\\[bfnrt]|\\u[0-9A-Fa-f]{{4}}|%[0-9A-Fa-f]{{2}})(?:{_TOKEN_PATTERN})|{_LABELED_SECRET_PATTERN}"
)
_WORD_START = r"(?:(?<![A-Za-z0-9])|(?<=\\[bfnrt])|(?<=\\u[0-9A-Fa-f]{4})|(?<=%[0-9A-Fa-f]{2}))"
SECRET_RE = re.compile(rf"{_WORD_START}(?:{_TOKEN_PATTERN})|{_LABELED_SECRET_PATTERN}", re.ASCII)
_SECRET_BYTES_RE = re.compile(SECRET_RE.pattern.encode())
# In addresses and headers, which only logs and messages hold: what says that a secret follows, then the secret. A word
# after "basic" is Base64 only if a capital, a digit or = follows a small letter or digit in it.
_USER_INFO = re.compile(r"(?<=://)[^/\s]+(?=@)")
_QUERY_KEYS = "sig|signature|x-(?:amz|goog)-(?:signature|credential|security-token)"
_REQUEST_SECRET_RE = re.compile(
    r"""((?i:\bauthorization\\?["']?\s*[:=]\s*\\?["']?(?:[a-z]+\s+)?|\bbearer\s+)"""
    r"""|(?i:secret_?(?:access_?)?key\\?["']?\s*[:=]\s*\\?["']?)"""
    rf"""|(?<![A-Za-z0-9])(?i:{_QUERY_KEYS})(?i:=|%3d|["']?:\s*["']?)|\b(?i:basic)\s+(?=\S*[a-z0-9][A-Z0-9=]))"""
    r"""[^\s"'&,;]+"""
)

_NAME_CHARACTER = r"[^\s\"'`<>|;,)\]}:/\\]"  # a letter of a file's name, as far as one can tell in a text
_PATH_TAIL = rf"(?:{_NAME_CHARACTER}|[/\\]|:(?!/))*"
_NONEMPTY_PATH_TAIL = _NAME_CHARACTER + _PATH_TAIL
# What has slashes and is no path: addresses, images written out, routes of HTTP, links to pages of the Hub's site.
_URL_PATTERNS = (
    r"(?<![\w+.-])(?!(?i:file):)[A-Za-z][\w+.-]{0,30}://[^\s/](?:(?!::)[^\s\"'<>`|;,)\]}])*",
    r";base64,[A-Za-z0-9+/]{60,}",
)
_HUB_PAGES = "blog|collections|datasets|docs|join|models|organizations|papers|pricing|spaces|tasks"
_SITE_PATH = (
    r"(?:\b(?:GET|HEAD|POST|PUT|PATCH|DELETE) (?=/)"
    rf"|(?:\]\(|(?:href|src)=\\?[\"']?)(?=/(?:{_HUB_PAGES})[/)\"']))(?!\S{{0,400}}/\.\.)"
)
# What stands before a path: no letter, point or slash, which would make it a part of something longer. Of Markdown's
# signs those that begin a word; in a pattern such as `data/**/x` they do not.
_BOUNDARY_CHARACTERS = r"""\s"'`“”‘’«=:(\[{<>,;|!@&–—→·"""
_PATH_START = (
    rf"(?:(?<=://)|(?<=:///)|(?<![^{_BOUNDARY_CHARACTERS}])|"
    + "|".join(
        rf"(?<={start}{sign})" for start in (r"\A", r"[\s(\[]") for sign in (r"\*", r"\*\*", "_", "__", "#", "…")
    )
    + ")"
)
_FOLDER_PATTERN = r"(?=[\d/._~+-]*[^\W\d_])[\w.@+%~-]+/"  # fractions and dates are none
_HOST_PATTERN = r"[A-Za-z0-9][\w.$-]+"
_DOMAIN_PATTERN = r"[\w-]+(?:\.[\w-]+)*\.(?!local/|lan/|home/|internal/)[A-Za-z]{2,}/"  # of `//cdn.example.org/x`
_PATH_PATTERNS = (
    rf"{_PATH_START}/(?!path/to\b(?!\S{{0,200}}/\.\.)|dev/null\b){_FOLDER_PATTERN}{_NONEMPTY_PATH_TAIL}",
    r"(?<=[\"'`])/[A-Za-z][\w.-]+/?(?=[\"'`])",
    rf"(?:{_PATH_START}(?<!:)//++|(?<=[Ff]ile:)//)(?!{_DOMAIN_PATTERN}){_FOLDER_PATTERN}{_NONEMPTY_PATH_TAIL}",
    rf"(?<![\w\\])(?:\\{{2}}{_HOST_PATTERN}\\(?!\\)|\\{{4}}{_HOST_PATTERN}\\{{2}}(?!\\))[\w$~](?:{_NAME_CHARACTER}|[/\\])*",  # \\host\share
    rf"(?<!\w)[A-Za-z]:(?:\\{{1,2}}|/){_NAME_CHARACTER}+(?:\\{{1,2}}|/){_NAME_CHARACTER}(?:{_NAME_CHARACTER}|[/\\])*",
)
_ABSOLUTE_START = rf"/[^\s/]|(?<!:)//[\w-]+/|\\{{2}}{_HOST_PATTERN}\\(?!\\)|[A-Za-z]:[\\/][^\\/\n]"
_WHOLE_PATH_RE = re.compile(rf"((?:[\w-]+[=:])*)((?:{_ABSOLUTE_START})[^\n]*)")  # it may stand behind `--flag=`
# What a terminal obeys or hides: control and format characters (marks of writing direction, soft hyphens, tag letters),
# separators of lines, and what is no character at all, such as a byte of a file's name that is no UTF-8. Format
# characters that names need stay: joiners (Arabic, Indic, emoji), and signs that are seen (numbers in Arabic).
UNSAFE_CHARACTER_RE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f]"
)


def find_secret(content: str | bytes | mmap.mmap) -> tuple[str, int] | None:
    """What the first secret in a text or mapped file is, in words that do not hold it, and where it begins."""
    code = str if isinstance(content, str) else str.encode
    for token in find_hub_tokens():
        if (place := content.find(code(token))) >= 0:
            return "a token of this machine", place
    secrets = SECRET_RE if code is str else _SECRET_BYTES_RE
    for start in _SECRET_PREFIXES:
        for place in _places(content, code(start)):
            if secrets.match(content, place):
                return f"what looks like an access token or key ({start}…)", place
    for sign in _ESCAPED_UNDERSCORES:
        for place in _places(content, code(sign)):
            if found := secrets.search(content, max(0, place - 30), place + 300):  # one may begin with a long name
                return f"what looks like an access token or key (with {sign})", found.start()
    return None


def _places(content: str | bytes | mmap.mmap, part: str | bytes) -> Iterator[int]:
    place = content.find(part)
    while place >= 0:
        yield place
        place = content.find(part, place + 1)


def redact(text: str) -> str:
    """A text without secrets: those of this machine, and whatever looks like one."""
    for secret in find_hub_tokens():
        text = text.replace(secret, "hf_***")
    text = SECRET_RE.sub(lambda found: "hf_***" if found[0].startswith("hf_") else "***", text)
    return _REQUEST_SECRET_RE.sub(r"\1***", _USER_INFO.sub("***", text))


def escape_control_characters(text: str) -> str:
    """A text of somebody else's, in one line, with nothing in it that a terminal obeys."""
    # \udcXX is a byte that is no UTF-8, as Python keeps it in a name.
    return UNSAFE_CHARACTER_RE.sub(
        lambda found: found[0].encode("unicode_escape").decode().replace("\\udc", "\\x"), text
    )


def make_printable(text: str) -> str:
    """A text of others that can be shown, `visible` line by line, and without secrets."""
    return "\n".join(map(escape_control_characters, redact(text).split("\n")))


def find_hub_tokens() -> list[str]:
    """From the places where huggingface_hub looks; nothing is asked of anybody."""
    from huggingface_hub import constants  # not of every command: `capivara --help` loads nothing of the Hub

    found = [os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")]
    with suppress(OSError, ValueError):
        found.append(Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8"))
    return [token.strip() for token in found if len(token.strip()) >= 8]


def find_machine_path(text: str) -> str | None:
    """The first absolute path in a text: of two parts at least, or in quotes; no address, Hub id, fraction or date."""
    return next((found[0] for found in _path_pattern().finditer(text) if found["path"]), None)


def hide_paths(value: Any) -> Any:
    """A text, or the texts of a JSON value, in which absolute paths are relative to the current folder, or their last
    part where they lie elsewhere: folders above may be named after a person. ValueError: two keys become the same."""
    if isinstance(value, dict):
        cleaned = {hide_paths(key): hide_paths(item) for key, item in value.items()}
        if len(cleaned) < len(value):
            raise ValueError(f"{sorted(value)} are the same but for their folders; rename one of them.")
        return cleaned
    if isinstance(value, list):
        return [hide_paths(item) for item in value]
    if not isinstance(value, str) or not ("/" in value or "\\" in value):
        return value
    if whole := _WHOLE_PATH_RE.fullmatch(value):  # it may hold blanks
        return whole[1] + _hide_path(whole[2])
    return _path_pattern().sub(lambda found: _hide_path(found[0]) if found["path"] else found[0], value)


def short_name(name: str) -> str:
    """How records and cards call a model or data set: a Hub id as it is, of a local place the last two parts of what
    `hide_paths` makes of it."""
    is_local = name.startswith(("/", "~", "\\\\")) or ".." in Path(name).parts or Path(name).exists()
    return "/".join(PurePosixPath(_hide_path(name) if is_local else name).parts[-2:]) or "."


def local_paths() -> list[str]:
    """Folders of this machine that a published file has no reason to name, longest first."""
    checkout = Path(__file__).resolve().parents[1]
    folders = {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), Path(sys.prefix), checkout}
    return sorted({str(folder) for folder in folders if len(folder.parts) > 1}, key=len, reverse=True)


def _path_pattern() -> re.Pattern[str]:
    ours = "|".join(map(re.escape, local_paths()))
    own = rf"(?:{ours})(?![\w.-])"
    site = rf"{_SITE_PATH}(?!{own})[^\s\"'<>`|;,)\]]*"
    return re.compile(
        rf"{'|'.join(_URL_PATTERNS)}|{site}|(?P<path>{_PATH_START}{own}{_PATH_TAIL}|{'|'.join(_PATH_PATTERNS)})"
    )


def _hide_path(path: str) -> str:
    here = Path.cwd()
    target = Path(os.path.normpath(here / path))
    # What lies above the home folder, such as `/`, is no folder of work: below it are people.
    is_inside = target.is_relative_to(here) and here not in Path.home().parents
    if is_inside and not re.match(r"~|\\\\|[A-Za-z]:[\\/]", path):
        return target.relative_to(here).as_posix()
    return re.split(r"[\\/]+", path.rstrip("\\/"))[-1]
