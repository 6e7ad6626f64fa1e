"""Names of languages: `pt` of the columns is `>>por<<`, `por_Latn`, `pt_XX` or `pt` to a translator.

python -c "from captions.languages import find_code; print(find_code('pt', ['por_Latn', 'spa_Latn']))"
"""

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import lru_cache
from typing import TypeVar

MAX_NAMED = 8  # codes that an error shows
# ISO 639-1 and the code of ISO 639-3 for the same, from the tables of the Library of Congress and SIL.
_PAIRS = """
aa:aar ab:abk ae:ave af:afr ak:aka am:amh an:arg ar:ara as:asm av:ava ay:aym az:aze ba:bak be:bel bg:bul bi:bis bm:bam
bn:ben bo:bod br:bre bs:bos ca:cat ce:che ch:cha co:cos cr:cre cs:ces cu:chu cv:chv cy:cym da:dan de:deu dv:div dz:dzo
ee:ewe el:ell en:eng eo:epo es:spa et:est eu:eus fa:fas ff:ful fi:fin fj:fij fo:fao fr:fra fy:fry ga:gle gd:gla gl:glg
gn:grn gu:guj gv:glv ha:hau he:heb hi:hin ho:hmo hr:hrv ht:hat hu:hun hy:hye hz:her ia:ina id:ind ie:ile ig:ibo ii:iii
ik:ipk io:ido is:isl it:ita iu:iku ja:jpn jv:jav ka:kat kg:kon ki:kik kj:kua kk:kaz kl:kal km:khm kn:kan ko:kor kr:kau
ks:kas ku:kur kv:kom kw:cor ky:kir la:lat lb:ltz lg:lug li:lim ln:lin lo:lao lt:lit lu:lub lv:lav mg:mlg mh:mah mi:mri
mk:mkd ml:mal mn:mon mr:mar ms:msa mt:mlt my:mya na:nau nb:nob nd:nde ne:nep ng:ndo nl:nld nn:nno no:nor nr:nbl nv:nav
ny:nya oc:oci oj:oji om:orm or:ori os:oss pa:pan pi:pli pl:pol ps:pus pt:por qu:que rm:roh rn:run ro:ron ru:rus rw:kin
sa:san sc:srd sd:snd se:sme sg:sag si:sin sk:slk sl:slv sm:smo sn:sna so:som sq:sqi sr:srp ss:ssw st:sot su:sun sv:swe
sw:swa ta:tam te:tel tg:tgk th:tha ti:tir tk:tuk tl:tgl tn:tsn to:ton tr:tur ts:tso tt:tat tw:twi ty:tah ug:uig uk:ukr
ur:urd uz:uzb ve:ven vi:vie vo:vol wa:wln wo:wol xh:xho yi:yid yo:yor za:zha zh:zho zu:zul
"""
# A group of languages, and the one of it that translators mean (the codes of NLLB-200 and of Tatoeba's models).
_OF_GROUP = """
ara:arb aym:ayr aze:azj est:ekk fas:pes ful:fuv kau:knc kur:kmr lav:lvs mlg:plt mon:khk msa:zsm nep:npi nor:nob ori:ory
orm:gaz pus:pbt que:quy sqi:als swa:swh uzb:uzn yid:ydd zho:cmn
"""
# Which letters a language is written with, by the first word of their names in Unicode; rare second scripts included,
# so that a right translation is never called wrong. A language that is not here is not checked.
_SCRIPTS = {
    "LATIN": "af ay az bm br bs ca ceb co cs cy da de ee en eo es et eu fi fil fo fr fy ga gd gl gn gv ha haw hr ht hu "
    "id ig is it jv kk ku la lb lg ln lt lv mg mi ms mt nb nl nn no nso ny oc om pl pt qu rm rn ro rw sg sk sl sm sn "
    "so sq sr ss st su sv sw tk tl tn to tr ts tw ty ug uz ve vi wo xh yo zu",
    "CYRILLIC": "ba be bg kk ky mk mn ru sr tg tk tt ug uk uz", "ARABIC": "ar az ckb fa ku pa ps sd ug ur",
    "DEVANAGARI": "hi mr ne sa bho mai", "BENGALI": "as bn", "GURMUKHI": "pa", "GUJARATI": "gu", "ORIYA": "or",
    "TAMIL": "ta", "TELUGU": "te", "KANNADA": "kn", "MALAYALAM": "ml", "SINHALA": "si", "THAI": "th", "LAO": "lo",
    "KHMER": "km", "MYANMAR": "my", "TIBETAN": "bo dz", "ETHIOPIC": "am ti", "GEORGIAN": "ka", "ARMENIAN": "hy",
    "HEBREW": "he yi", "GREEK": "el", "HANGUL": "ko", "CJK": "ja zh yue", "HIRAGANA": "ja", "KATAKANA": "ja",
}  # fmt: skip
# Codes of ISO 15924, as in zh-Hant and por_Latn.
_SCRIPT_CODES = {
    "latn": "LATIN", "deva": "DEVANAGARI", "cyrl": "CYRILLIC", "arab": "ARABIC", "beng": "BENGALI", "guru": "GURMUKHI",
    "gujr": "GUJARATI", "orya": "ORIYA", "taml": "TAMIL", "telu": "TELUGU", "knda": "KANNADA", "mlym": "MALAYALAM",
    "sinh": "SINHALA", "thai": "THAI", "laoo": "LAO", "khmr": "KHMER", "mymr": "MYANMAR", "tibt": "TIBETAN",
    "ethi": "ETHIOPIC", "geor": "GEORGIAN", "armn": "ARMENIAN", "hebr": "HEBREW", "grek": "GREEK", "hang": "HANGUL",
    "hans": "CJK", "hant": "CJK",
}  # fmt: skip

_THREE_LETTERS = dict(pair.split(":") for pair in _PAIRS.split())
TWO_LETTERS = {long: short for short, long in _THREE_LETTERS.items()}
_GROUP_MEMBER = dict(pair.split(":") for pair in _OF_GROUP.split())


def find_code(language: str, codes: Iterable[str], translator: str = "The translator") -> str:
    """The code of `codes`, what a translator calls its languages, that means `language`: of ISO 639-1 or 639-3, with a
    script or region where it matters (pt, por, zh-Hant, pt-BR), or one of `codes`.

    Raises ValueError where there is none, and the nearest are named, or several, and all of them are.
    """
    codes = list(codes)
    same = [code for code in codes if _plain(code) == _plain(language)]
    found = same or [code for code in codes if _fits(language, code)]
    bare = [code for code in found if len(_parts(code)) == 1]
    if len(same) == 1 or len(bare) == 1 or len(found) == 1:
        return (same or bare or found)[0]
    if found:
        raise ValueError(f"{translator} knows {language!r} as several: {', '.join(sorted(found))}. Say which.")
    names = sorted(same_language(language))
    near = dict.fromkeys(code for name in names for code in difflib.get_close_matches(name, codes, MAX_NAMED, 0.5))
    near |= dict.fromkeys(sorted(code for code in codes if code[:1] == language[:1].lower()))
    shown = ", ".join(list(near or sorted(codes))[:MAX_NAMED])
    raise ValueError(
        f"{translator} does not know the language {language!r}; of its {len(codes)} codes the nearest are {shown}."
    )


def same_language(language: str) -> set[str]:
    """The codes, without script and region, for the language of a code."""
    name = _parts(language)[0]
    long = _THREE_LETTERS.get(name, name)
    group = next((group for group, member in _GROUP_MEMBER.items() if member == long), long)
    return {name, long, group, TWO_LETTERS.get(group, name), _GROUP_MEMBER.get(group, group)}


@lru_cache
def scripts_of(language: str) -> frozenset[str]:
    """First words of the Unicode names of its letters; empty for a language that is not in the table."""
    for part in _parts(language)[1:]:
        if part in _SCRIPT_CODES:
            return frozenset({_SCRIPT_CODES[part]})
    names = same_language(language)
    return frozenset(script for script, known in _SCRIPTS.items() if names & set(known.split()))


def _fits(language: str, code: str) -> bool:
    """Whether two codes mean one language; two scripts or two regions differ, one and none do not."""
    if same_language(language).isdisjoint(same_language(code)):
        return False
    (_, *ours), (_, *theirs) = _parts(language), _parts(code)
    for length in (4, 2):  # scripts have four letters, regions two; XX is mBART's for "none"
        one, other = ({part for part in rest if len(part) == length and part != "xx"} for rest in (ours, theirs))
        if one and other and one != other:
            return False
    return True


def _parts(code: str) -> list[str]:
    return _plain(code).split("-")


def _plain(code: str) -> str:
    return code.strip().lower().replace("_", "-")


S = TypeVar("S", bound=Sized)
# Where a text is cut, the best place first: ends of sentences, with no blank behind them in Chinese and Japanese; then
# of clauses; then of words.
BOUNDARIES = (r"(?<=[.!?…।॥؟])\s+|(?<=[。！？])|\n+", r"(?<=[,;:،؛、])\s+|(?<=[，；：])", r"\s+")


def cut(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Pieces of `text` that fit, as long as possible, in order; `text` itself where it fits.

    A word that does not fit is cut into halves. A single letter is a piece even if it does not fit.
    """
    if len(text) < 2 or fits(text):
        return [text]
    for boundary in BOUNDARIES:
        units = [unit for unit in re.split(boundary, text) if unit.strip()]
        if len(units) > 1:
            break
    else:
        return cut(text[: len(text) // 2], fits) + cut(text[len(text) // 2 :], fits)
    pieces: list[str] = []
    for unit in units:
        for part in cut(unit, fits):
            if pieces and fits(f"{pieces[-1]} {part}"):
                pieces[-1] += f" {part}"
            else:
                pieces.append(part)
    return pieces


def groups(items: Iterable[S], total: int, size: int = sys.maxsize) -> Iterator[list[S]]:
    """Items in their order, at most `size` at once and together no longer than `total`, but for a single one."""
    group: list[S] = []
    length = 0
    for item in items:
        if group and (len(group) == size or length + len(item) > total):
            yield group
            group, length = [], 0
        group.append(item)
        length += len(item)
    if group:
        yield group
