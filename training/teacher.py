"""The text teacher: a frozen text tower's embeddings of sentences in its language, computed once and cached.

A translated caption is held to what the teacher makes of the caption that it translates; a caption in the teacher's
language, an anchor, to what the teacher makes of itself, so that the student does not forget that language.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from capivara_common.files import check_free_space, write_json
from capivara_common.tasks import all_parts
from caption_data.embedding_cache import FILES_VERSION, EmbeddingCache, cache_key
from caption_data.rows import rows_fingerprint
from modeling_capivara import CapivaraModel, CapivaraProcessor
from modeling_capivara.embedding import embed_texts
from modeling_capivara.loading import load_model, load_processor, weights_digest
from training.matryoshka import load_rotation

SHARD_TEXTS = 8192  # of one file of the cache: what a kill can lose
TEXT_BATCH = 64  # texts that go through the tower at once
ROWS_PER_CHUNK = 10_000  # of a table that is read from one end to the other


@dataclass
class Teacher:
    """The model whose text tower teaches."""

    model: CapivaraModel
    processor: CapivaraProcessor

    @classmethod
    def load(cls, name: str, base: CapivaraModel, processor: CapivaraProcessor) -> "Teacher":
        """ "base" is the model before training; anything else a folder or Hub id.

        Raises:
            ValueError: its embeddings are not as wide as the base's, or of a space that is rotated.
        """
        if name == "base":
            return cls(base, processor)
        model = load_model(name)
        if model.config.projection_dim != base.config.projection_dim:
            raise ValueError(
                f"text_teacher: the embeddings of {name} are {model.config.projection_dim} wide, those of the model "
                f"are {base.config.projection_dim}. A teacher has the width of its student: give `base`, or another."
            )
        if load_rotation(name) is not None:
            raise ValueError(
                f"text_teacher: {name} was trained with matryoshka_dims, in a space that is rotated. Give its base."
            )
        return cls(model.to(base.device).eval(), load_processor(name))

    @cached_property
    def digest(self) -> str:
        """Of the weights of the text tower."""
        return weights_digest(self.model, ("text_model.", "text_projection."))


@dataclass
class TeacherTexts:
    """The sentences of one source in the teacher's language, and the teacher's embeddings of them.

    Row r of the source has the texts `starts[r]` to `starts[r + 1]`; the numbers of the texts count over all rows.
    """

    rows: Sequence[list[str]]
    starts: np.ndarray  # (rows + 1,)
    cache: EmbeddingCache | None = None

    @classmethod
    def of(cls, table: Dataset, column: str) -> "TeacherTexts":
        """Those of a column of lists; it stays where it is, a memory-mapped file."""
        lengths = [len(texts) for chunk in table.select_columns(column).iter(ROWS_PER_CHUNK) for texts in chunk[column]]
        return cls(table[column], np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the texts and their order."""
        return rows_fingerprint(self.rows)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def drawn(self, rows: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """(rows,), number of the text that each row's draw, from 0 to below 1, falls on.

        A caption is drawn by the same number: where a row has as many captions in both languages, which are then in the
        same order, the text is what the caption translates; else it is any of the row's.
        """
        lengths = self.starts[rows + 1] - self.starts[rows]
        return self.starts[rows] + (draws * lengths).astype(np.int64)

    def text(self, row: int, number: int) -> str:
        """The text with this number, which is of this row."""
        return self.rows[int(row)][int(number - self.starts[row])]

    def embeds(self, numbers: np.ndarray) -> Tensor:
        """(texts, width), unit length, float32."""
        found = [self.cache.arrays[number // SHARD_TEXTS][number % SHARD_TEXTS] for number in numbers.tolist()]
        return torch.from_numpy(np.stack(found).astype(np.float32))

    def embed(self, teacher: Teacher, root: Path, accelerator: Accelerator, where: str) -> None:
        """Open the cache under `root`, float16; all processes make what is missing of it.

        Raises OSError where the disk has too little space.
        """
        parts = self._depends_on(teacher, accelerator.mixed_precision)
        self.cache = EmbeddingCache(root / cache_key(parts), all_parts(len(self), SHARD_TEXTS))
        width = teacher.model.config.projection_dim
        if missing := self.cache.missing():
            check_free_space(self.cache.folder, sum(len(self.cache.parts[number]) for number in missing) * width * 2)
            write_json(self.cache.folder / "cache.json", parts)
        self.cache.make(missing, lambda numbers: self._embedded(numbers, teacher, accelerator, where))
        self.cache.open((width,), np.float16, mapped=True)

    def _depends_on(self, teacher: Teacher, precision: str) -> dict[str, Any]:
        tokenizer = json.loads(teacher.processor.tokenizer.backend_tokenizer.to_str())
        tokenizer |= {"padding": None, "truncation": None}  # of the last call
        return {
            "files": FILES_VERSION,
            "tower_weights": teacher.digest,
            "tower_config": teacher.model.config.text_config.to_json_string(),
            "tokenizer": hashlib.blake2b(json.dumps(tokenizer).encode(), digest_size=16).hexdigest(),
            "max_tokens": teacher.processor.tokenizer.model_max_length,
            "precision": precision,
            "texts": self.fingerprint,
        }

    def _embedded(
        self, numbers: list[int], teacher: Teacher, accelerator: Accelerator, where: str
    ) -> Iterator[tuple[np.ndarray, list]]:
        parts = [self.cache.parts[number] for number in numbers]
        quiet = not accelerator.is_main_process
        with tqdm(total=sum(map(len, parts)), desc=f"Teacher, {where}", unit="text", disable=quiet) as bar:
            for part in parts:
                first, last = np.searchsorted(self.starts, [part.start, part.stop - 1], side="right") - 1
                texts = [text for row in range(first, last + 1) for text in self.rows[int(row)]]
                begin = part.start - int(self.starts[first])
                with accelerator.autocast():
                    embeds = embed_texts(
                        teacher.model, teacher.processor, texts[begin : begin + len(part)], TEXT_BATCH,
                        on_batch=bar.update,
                    )  # fmt: skip
                yield embeds.half().numpy(), []
