"""Generate captions with a vision-language model on a server that speaks OpenAI's protocol (`--captioner chat`).

Each request contains a prompt and an image. The captions are written to the column `generated-captions-<language>`.
Unusable captions are listed in the column `generated-quality-<language>` instead. If a run is killed, only the requests
that are not answered yet are lost.
"""

import base64
import hashlib
import io
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from datasets import List, Value

from capivara_common.cli import check_at_least, flag
from capivara_common.files import write_json
from capivara_common.image_files import BadRow
from caption_data.rows import CAPTION_COLUMN_RE, CAPTIONS_FEATURE
from captions.captioners.base import Captioner
from captions.captioners.blip2 import DEFAULT_MODEL
from captions.chat.answers import USAGE_FIELDS, Answer, Choice, clean_answer, detect_refusal_or_truncation
from captions.chat.client import ChatClient
from captions.chat.flags import CHAT, ChatBackend, ChatFlags, check_chat_flags, get_settings_that_change_answers
from captions.chat.prompts import CaptionPrompts
from captions.journal import append_to_journal, read_journal
from captions.quality import QUALITY_FILE, count_and_iter_row_qualities, find_caption_quality_flags
from captions.stages import DECODED_KEY, Row, RowStage, read_stage_record

JPEG_QUALITY = 90
PROBE_SIDE = 32  # side in pixels of the gray test image that is sent to a server before the work begins
# Rules of thumb with which a dry run estimates the number of tokens: pixels of an image per token, tokens per generated
# caption, and letters of a prompt per token.
PIXELS_PER_TOKEN, TOKENS_PER_CAPTION, LETTERS_PER_TOKEN = 28 * 28, 40, 4
MAX_LISTED_CHARACTERS = 200  # longer answers are shortened in the list of unusable answers
# A journal is a temporary file next to an output file. Each answer is stored in it at once, so that a killed run loses
# only the requests that are not answered yet.
JOURNAL_SUFFIX = ".answers.jsonl"
SCHEMA_KEY = "caption"  # key of the text in the JSON answers that the flag `response_schema` requests
# Type of the dataset column `generated-quality-<language>`. `captions` is the number of answers for an image. `flagged`
# lists the unusable answers, which are not in the caption column. For each of them, `position` is the index of its
# prompt, and `flags` names its problem.
_FLAGGED_FEATURES = {"position": Value("int32"), "flags": List(Value("string")), "answer": Value("string")}
QUALITY_FEATURES = {"captions": Value("int32"), "flagged": List(_FLAGGED_FEATURES)}
QUALITY_FEATURES |= {name: Value("int32") for name in USAGE_FIELDS}


@dataclass(kw_only=True)
class ChatCaptionerFlags(ChatFlags):
    """Flags of the backend that generates captions with a model on a server (`--captioner chat`)."""

    image_side: int = flag(
        448, "Longest side of the images that are sent, in pixels. Smaller images are not enlarged.", group=CHAT
    )
    n: int = flag(1, "Captions per prompt and image. More than 1 requires --temperature above 0.", group=CHAT)


class ChatCaptioner(ChatBackend, Captioner):
    """Captioner that sends images to a vision-language model on a server, and receives captions.

    Args:
        args: Flags of `captions.generate`.
        stage: Access to the rows to caption. None: only check whether the servers can be used, with fewer attempts per
            request.

    Raises:
        ValueError: If a flag or the file of prompts is invalid, the server refuses the request, or the model does not
            see images.
        ConnectionError: If the server can't be reached.
    """

    flags = ChatCaptionerFlags
    has_report = True

    def __init__(self, args: Any, stage: RowStage | None):
        self._args, self._stage = args, stage
        self._prompts = CaptionPrompts(args.prompts, args.caption_language)
        self._client = ChatClient(args, stage.rank if stage else 0)
        probe = convert_image_to_jpeg_data_url(PIL.Image.new("RGB", (PROBE_SIDE, PROBE_SIDE), "gray"), PROBE_SIDE)
        read = self._client.connect(self._prompts.messages(0, probe), is_check=stage is None)
        # Check that the model sees images. If the model reads only text, some servers (`transformers serve`) ignore the
        # image without an error, and the model would invent captions. Such a server reports the same number of tokens
        # read for a request with an image and for the same request without it.
        if read and read == self._client.connect(self._prompts.messages(0, None)):
            raise ValueError(
                f"{args.model} does not see images: with and without an image, the server {args.base_url[-1]} reads "
                f"{read} tokens. Serve a vision-language model."
            )
        self._journal: Path | None = None  # file with the answers that were received for the current output file
        self._stored: dict[str, list[Answer]] = {}  # content of the journal: {key of a request: its answers}
        self.settings = {
            "captioner": "chat",
            "model": self._client.model,
            "caption_language": args.caption_language,
            "prompts": self._prompts.content,
            "image_side": args.image_side,
            "n": args.n,
            **get_settings_that_change_answers(args),
        }

    @classmethod
    def check_flags(cls, args: Any) -> None:
        """Check the flags and the file of prompts for the model, without network access.

        Raises ValueError if a flag or the file is invalid, and ImportError if a package is missing.
        """
        check_chat_flags(args, "--captioner chat")
        check_at_least(args, 1, "image_side", "n")
        if args.model == DEFAULT_MODEL:
            raise ValueError("--captioner chat requires --model, the name of the model on the server.")
        if args.n > 1 and args.temperature == 0:
            raise ValueError(f"n must be 1 with --temperature 0, because all captions would be equal, got {args.n}.")
        CaptionPrompts(args.prompts, args.caption_language)

    @classmethod
    def describe_work(cls, args: Any, stage: RowStage) -> list[str]:
        """Estimate how many requests and tokens the captions need on the server. A dry run prints this estimate.

        Args:
            args: Flags of `captions.generate`.
            stage: Access to the rows to caption. Rows that are captioned already are not counted.

        Returns:
            A list with one line: the numbers of images and requests, and the estimated number of tokens.
        """
        prompts = CaptionPrompts(args.prompts, args.caption_language)
        images = sum(map(len, stage.missing_parts()))
        requests = images * len(prompts.prompts)
        letters = sum(len(str(prompts.messages(number, ""))) for number in range(len(prompts.prompts)))
        read = requests * args.image_side**2 // PIXELS_PER_TOKEN + images * letters // LETTERS_PER_TOKEN
        written = requests * args.n * TOKENS_PER_CAPTION
        return [f"{images:,} images, {requests:,} requests, about {read:,} tokens read and {written:,} written"]

    @classmethod
    def columns(cls, args: Any) -> dict[str, Any]:
        """Return the two columns that this backend adds to the dataset, as a dict `{"column name": feature}`.

        The columns hold the captions and a list of unusable answers. A feature is a column type of `datasets`.
        """
        language = args.caption_language
        return {f"generated-captions-{language}": CAPTIONS_FEATURE, f"generated-quality-{language}": QUALITY_FEATURES}

    def start_part(self, part: range) -> None:
        """Prepare for the rows of the next output file: load the answers that an interrupted run has already received.

        These answers are not requested again. The stored answers of the previous output file are deleted.

        Args:
            part: Range of the row indices in the output file, counted from 0 over the whole split.
        """
        if self._journal is not None:
            self._journal.unlink(missing_ok=True)  # the previous output file is complete
        self._journal = self._stage.path(part).with_suffix(JOURNAL_SUFFIX)
        records = read_journal(self._journal)
        self._stored = {record["request"]: [Answer(**answer) for answer in record["answers"]] for record in records}

    def caption_rows(self, rows: list[Row]) -> list[Row | BadRow]:
        """Request captions of the images in dataset rows from the server.

        Args:
            rows: Rows with a decoded image under the key `captions.stages.DECODED_KEY`.

        Returns:
            For each row, a dict `{"column name": value}` with the new columns. If no generated caption is usable and
            the row has no other caption, a `BadRow`, so that the row is skipped.
        """
        urls = [convert_image_to_jpeg_data_url(row[DECODED_KEY], self._args.image_side) for row in rows]
        count = len(self._prompts.prompts)
        answers = self._client.map(self._request_captions, [(url, number) for url in urls for number in range(count)])
        self._stage.bar.set_postfix_str(self._client.describe_usage(), refresh=False)
        return [self._new_columns(row, answers[place * count : (place + 1) * count]) for place, row in enumerate(rows)]

    async def _request_captions(self, item: tuple[str, int]) -> list[Answer]:
        """Return the answers about an image for one prompt, from the journal if possible, otherwise from the server.

        Args:
            item: A tuple (image as a data URL, index of the prompt).
        """
        url, number = item
        key = f"{hashlib.blake2b(url.encode(), digest_size=16).hexdigest()}-{number}"
        if key not in self._stored:
            answers = await self._client.ask(self._prompts.messages(number, url), self._judge, SCHEMA_KEY, self._args.n)
            record = {"request": key, "answers": [asdict(answer) for answer in answers]}
            append_to_journal(self._journal, record)
            self._stored[key] = answers
        return self._stored[key]

    def _judge(self, choice: Choice, value: object) -> tuple[str, str | None]:
        """Return the tuple (cleaned caption, first fault) for an answer; the fault is None if none was found.

        A fault is the name of a problem, such as "refused".

        Args:
            choice: The answer of the model.
            value: Caption in a JSON answer. If it is no text, the whole answer is the caption.
        """
        text = clean_answer(value if isinstance(value, str) else choice.text)
        faults = [detect_refusal_or_truncation(text, choice)]
        faults += find_caption_quality_flags(text, self._args.caption_language)
        return text or choice.refusal or "", next(filter(None, faults), None)

    def _new_columns(self, row: Row, answers: list[list[Answer]]) -> Row | BadRow:
        """Return the new columns of a row as `{"column name": value}`, or a BadRow if the row has no caption at all.

        Args:
            row: The row.
            answers: For each prompt, the answers about the image of the row.
        """
        pairs = [(position, answer) for position, group in enumerate(answers) for answer in group]
        captions = [answer.text for _, answer in pairs if answer.fault is None]
        faulty = [(position, answer) for position, answer in pairs if answer.fault is not None]
        others = (text for name, texts in row.items() if CAPTION_COLUMN_RE.fullmatch(name) for text in texts)
        if not captions and not any(map(str.strip, others)):
            _, first = faulty[0]
            return BadRow(first.fault, f"all {len(faulty)} answers were unusable; the first answer: {first.text}")
        flagged = [
            {"position": position, "flags": [answer.fault], "answer": answer.text[:MAX_LISTED_CHARACTERS]}
            for position, answer in faulty
        ]
        usage = {name: sum(int(getattr(answer, name)) for _, answer in pairs) for name in USAGE_FIELDS}
        quality = {"captions": len(pairs), "flagged": flagged, **usage}
        return dict(zip(self.columns(self._args), (captions, quality), strict=True))

    @classmethod
    def report(cls, args: Any) -> None:
        """Write the file `quality.json`, which counts the unusable answers and the tokens, and delete temporary files.

        Skipped rows are not counted.

        Args:
            args: Flags of `captions.generate`.
        """
        (_, column), counts, usage = cls.columns(args), Counter(), Counter(dict.fromkeys(USAGE_FIELDS, 0))
        report = {"language": args.caption_language, "rows": 0, "captions": 0, "flagged": 0}
        # Skipped rows are not in the output, so their answers are not counted. *.skipped.jsonl files list these rows.
        for quality in count_and_iter_row_qualities(report, args.output, column):
            counts.update(name for answer in quality["flagged"] for name in answer["flags"])
            usage.update({name: quality[name] for name in USAGE_FIELDS})
        flags = {name: {"captions": count} for name, count in counts.most_common()}
        report |= {"flags": flags, "captioner": read_stage_record(args.output)["settings"], "usage": dict(usage)}
        write_json(args.output / QUALITY_FILE, report)
        # All output files have been written, so the journals are not needed any more.
        for path in args.output.glob(f"*{JOURNAL_SUFFIX}"):
            path.unlink(missing_ok=True)


def convert_image_to_jpeg_data_url(image: PIL.Image.Image, side: int) -> str:
    """Convert an image to a data URL that contains a JPEG, as chat requests need it.

    Args:
        image: The image, in any mode. Transparent pixels become white.
        side: Longest side of the JPEG in pixels. A smaller image keeps its size.
    """
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.thumbnail((side, side), PIL.Image.Resampling.LANCZOS)
    if image.mode == "RGBA":
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
