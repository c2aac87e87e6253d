"""How requests end without an answer, told to the observer: once each."""

from layercast.server.batching.policy import Observer, Phase, Rejection
from layercast.server.errors import DeadlineExceeded
from layercast.server.work import Course


class Endings:
    """Tells `observer` how requests end. Of the parts of one course, only the first to end is told.

    Of several requests in one course, each is told.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def rejected(self, reason: Rejection, course: Course | None) -> None:
        """A request was refused."""
        for _ in range(_uncounted(course)):
            self._observer.rejected(reason)

    def expired(self, when: Phase, course: Course | None) -> None:
        """A request's deadline passed before its answer."""
        for _ in range(_uncounted(course)):
            self._observer.expired(when)

    def cancelled(self, when: Phase, course: Course | None) -> None:
        """A caller went away."""
        for _ in range(_uncounted(course)):
            self._observer.cancelled(when)


def too_late() -> DeadlineExceeded:
    """Return the error of rows that can't be answered within their deadline."""
    return DeadlineExceeded("the deadline passes before the answer can be there; allow more time or send fewer rows")


def _uncounted(course: Course | None) -> int:
    """Return how many requests end, which from now on are counted."""
    if course is None:
        return 1
    counted, course.counted = course.counted, True
    return 0 if counted else course.requests
