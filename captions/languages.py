"""Find the codes that translators use for a language, and the English names of languages.

Each translator has its own language codes. For example, Portuguese is `pt` in the column name `captions-pt`, but `por`,
`por_Latn`, `pt_XX` or `pt` for different translators.
"""

import difflib
from collections.abc import Iterable

from langcodes import Language, LanguageTagError

from capivara_common.environment import require_packages

MAX_NAMED_CODES = 8  # largest number of similar language codes that an error message lists
NAMELESS_CODES = ("mis", "mul", "und", "zxx")  # ISO 639 codes that name no single language, such as `mul` (multiple)


def parse_language(code: str) -> Language | None:
    """Split a language code into its language, script and region.

    Args:
        code: BCP 47 code such as "pt-BR", or the code of a translator such as "por_Latn".

    Returns:
        The parsed code, with the attributes `language`, `script` and `territory` (region). None if the code is invalid.
    """
    try:
        return Language.get(code.strip()).prefer_macrolanguage()
    except LanguageTagError:
        return None


def find_translator_language_code(language: str, codes: Iterable[str], translator_name: str = "The translator") -> str:
    """Find the code that a translator uses for a language, because translators spell language codes differently.

    Args:
        language: ISO 639 code, optionally with script or region, for example "pt", "por", "zh-Hant" or "pt-BR".
        codes: All language codes of the translator.
        translator_name: Name of the translator, for the error message.

    Returns:
        The best code for the same language in the same script: with the same spelling if possible, otherwise with the
        same region, otherwise without a region.

    Raises:
        ValueError: If no code matches. The message lists the most similar codes.
    """
    codes, wanted = list(codes), parse_language(language)
    parsed = {code: parse_language(code) for code in codes}
    matches = [code for code in codes if wanted and parsed[code] and _is_same_language_and_script(wanted, parsed[code])]
    if matches:
        return min(matches, key=lambda code: (code != language, parsed[code] != wanted, bool(parsed[code].territory)))
    near = sorted(codes, key=lambda code: -difflib.SequenceMatcher(None, language.lower(), code.lower()).ratio())
    raise ValueError(
        f"{translator_name} does not know the language {language!r}. The most similar of its {len(codes)} codes are "
        f"{', '.join(near[:MAX_NAMED_CODES])}."
    )


def _is_same_language_and_script(wanted: Language, other: Language) -> bool:
    """Return True if two language codes mean the same language in the same script.

    Codes with two different regions (pt-BR and pt-PT) are not the same. A code without a region matches any region.
    """
    # In the language codes of the model mBART, such as `ar_XX`, the region XX means that there is no region.
    regions = {wanted.territory, other.territory} - {None, "XX"}
    is_same_script = wanted.maximize().script == other.maximize().script
    return wanted.language == other.language and is_same_script and len(regions) < 2


def language_name(code: str) -> str:
    """Return the English name of a language, for example "Portuguese (Brazil)" for pt-BR.

    Raises:
        ValueError: If the code is invalid or has no name.
        ImportError: If the package `language_data` is not installed.
    """
    require_packages("The name of a language", "chat", "language_data")
    language = parse_language(code)
    # Codes for private use (qaa to qtz) have a display name with "Unknown".
    if language is None or language.language in NAMELESS_CODES or "Unknown" in language.display_name("en"):
        raise ValueError(
            f"The language code {code!r} has no English name, but prompts need this name. Use the code of a language, "
            "optionally with script or region, such as pt, pt-BR or zh-Hant."
        )
    return language.display_name("en")
