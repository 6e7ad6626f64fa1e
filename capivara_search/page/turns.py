"""Questions of visitors one after another, each within a stated time: tokenizers are no good in two threads at once.

turns = Turns()
answer = await turns.ask(lambda: index.search("um gato"))
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

QUERY_S = 20  # of a question, which takes well under 1 s; then it is given up, and the next one is answered
WAIT_S = 30  # for the questions before it
MAX_WAITING = 256  # questions
MAX_GIVEN_UP = 3  # threads of questions that were given up and still run, as no thread can be ended
T = TypeVar("T")


class Refusal(ValueError):
    """A request that is not answered.

    Args:
        code: of the reason, such as "busy"; `words/*.json` have its text in each language.
        status: of HTTP.
        values: that the text names.
    """

    def __init__(self, code: str, status: int = 400, **values: object):
        super().__init__(code)
        self.code, self.status, self.values = code, status, values


class Turns:
    """One question at a time, in a thread that is left to itself where the question takes too long."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(1)
        self._waiting = self._given_up = 0
        self._tasks = _thread()

    async def ask(self, question: Callable[[], T], seconds: float | None = None) -> T:
        """The answer to a question, when its turn has come; it is given up after `seconds`, or else `QUERY_S`.

        Raises:
            Refusal: too many wait, or it took too long.
        """
        if self._waiting >= MAX_WAITING or self._given_up >= MAX_GIVEN_UP:
            raise Refusal("busy", 503)
        self._waiting += 1
        try:
            async with asyncio.timeout(WAIT_S):
                await self._turn.acquire()
        except TimeoutError:
            raise Refusal("busy", 503) from None
        finally:
            self._waiting -= 1
        try:
            return await self._answered(question, QUERY_S if seconds is None else seconds)
        finally:
            self._turn.release()

    async def _answered(self, question: Callable[[], T], seconds: float) -> T:
        answer: Future[T] = Future()
        answer.set_running_or_notify_cancel()
        self._tasks.put((question, answer))
        waited = asyncio.wrap_future(answer)
        if (await asyncio.wait([waited], timeout=seconds))[0]:
            return waited.result()
        waited.cancel()
        self._given_up += 1
        loop = asyncio.get_running_loop()
        answer.add_done_callback(lambda _: loop.call_soon_threadsafe(self._ended))
        self._tasks.put(None)
        self._tasks = _thread()
        raise Refusal("too_slow", 503)

    def _ended(self) -> None:
        self._given_up -= 1


def _thread() -> SimpleQueue:
    """The tasks of a new thread, pairs of question and answer, until one is None."""
    tasks: SimpleQueue = SimpleQueue()

    def work() -> None:
        while (task := tasks.get()) is not None:
            question, answer = task
            try:
                answer.set_result(question())
            except BaseException as error:
                answer.set_exception(error)
            del task, question, answer  # they hold a picture

    threading.Thread(target=work, daemon=True).start()
    return tasks
