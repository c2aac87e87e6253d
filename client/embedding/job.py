"""The spine: list the files, ask for those that are missing, keep what comes, write the output."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from layercast.client.embedding.asking import Answer, Asker
from layercast.client.embedding.listing import Entry
from layercast.client.embedding.parts import Parts, form_of
from layercast.client.embedding.writing import check_form
from layercast.client.progress import Progress

Unreadable = list[tuple[str, str]]


def collect(
    asker: Asker, parts: Parts, entries: Sequence[Entry], rows: int, in_flight: int, output: Path, progress: Progress
) -> Unreadable:
    """Ask for every file that the parts lack, `rows` a request, `in_flight` requests at once.

    Returns path and reason of the files that could not be read, in order. Whatever ends it early, what was answered
    is in the parts.
    """
    unreadable: Unreadable = []
    pending: deque[Future[Answer]] = deque()

    def keep(answer: Answer) -> None:
        unreadable.extend(answer.unreadable)
        if answer.values is not None:
            check_form(form_of(answer.values), output)
            parts.add(answer.entries, answer.values)
        progress.advance(len(answer.entries), len(answer.unreadable))

    def keep_next() -> None:
        keep(pending[0].result())
        pending.popleft()

    with ThreadPoolExecutor(in_flight, "embed") as pool:
        try:
            # The same files go together in every run, whatever is known by then.
            for start in range(0, len(entries), rows):
                missing = [entry for entry in entries[start : start + rows] if entry not in parts]
                if not missing:
                    continue
                pending.append(pool.submit(asker.answer, missing))
                # One batch of files is read while another is on its way, and no more wait than that.
                if len(pending) >= 2 * in_flight:
                    keep_next()
            while pending:
                keep_next()
        except BaseException:
            asker.stop()
            pool.shutdown(cancel_futures=True)
            _rescue(pending, keep)
            raise
        finally:
            parts.flush()
    return unreadable


def _rescue(pending: deque[Future[Answer]], keep: Callable[[Answer], None]) -> None:
    """Keep the answers that had come before the end."""
    for future in pending:
        if future.done() and not future.cancelled() and future.exception() is None:
            keep(future.result())
