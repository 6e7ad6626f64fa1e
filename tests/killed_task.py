"""`eval.retrieval` in tasks with small shards, one of which gets SIGKILL in its second shard of images. Run by a test.

    python tests/killed_task.py --model MODEL --dataset DATA …

Workers are forks of a process that has computed nothing yet. The name of every shard that is written is a line of the
file `written` in the current folder; once there is a file `killed`, nobody is killed.
"""

import os
import signal
import sys
from pathlib import Path

import multiprocess

from caption_data.embedding_cache import EmbeddingCache
from eval import embeddings, retrieval

write = EmbeddingCache.write


def noted(cache: EmbeddingCache, number: int, *content: object) -> None:
    name = cache.paths()[number].name
    if name.startswith("images-") and number == 1:
        try:
            os.close(os.open("killed", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    write(cache, number, *content)
    with Path("written").open("a") as file:
        file.write(f"{name}\n")


if __name__ == "__main__":
    embeddings.IMAGES_PER_SHARD, embeddings.TEXTS_PER_SHARD, EmbeddingCache.write = 2, 10, noted
    context = multiprocess.get_context("fork")
    multiprocess.get_context = lambda method=None: context
    retrieval.main(sys.argv[1:])
