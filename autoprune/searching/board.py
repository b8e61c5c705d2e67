"""What processes that share a storage let each other know: texts, each of which is made once for all of them.

A text is a user attribute of an empty study of its own; whoever creates the study makes the text, the others wait.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import final

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.study import Study

from autoprune.searching.database import Database
from autoprune.searching.owners import Heartbeat, Owner, Watch, this_process

_PREFIX = "autoprune: "
_TEXT, _MAKER = "text", "maker"
_LOOK_S = 1.0


@final
class Board:
    """The board of one database."""

    def __init__(
        self, url: str, *, note: Callable[[str], None] | None = None, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        logging.getLogger("optuna").setLevel(logging.WARNING)
        self._storage = Database(url, note=note)
        self._note = note or _ignored
        self._sleep = sleep

    def once(self, name: str, make: Callable[[], str]) -> tuple[str, bool]:
        """The text called `name`, and whether this call made it: it does where nobody has, or who began to is dead."""
        study, mine = self._study(name)
        watch, told = Watch(study), False
        while not mine:
            text = study.user_attrs.get(_TEXT)
            if isinstance(text, str):
                return text, False
            maker = Owner.parse(str(study.user_attrs.get(_MAKER, "")))
            if maker is None or not watch.alive(maker):
                break
            if not told:
                self._note(f"{name.partition(' ')[0]}: another process measures it; waiting")
                told = True
            self._sleep(_LOOK_S)
        with Heartbeat(study):
            study.set_user_attr(_MAKER, this_process().text)
            text = make()
            study.set_user_attr(_TEXT, text)
        return text, True

    def _study(self, name: str) -> tuple[Study, bool]:
        """The study that holds the text, and whether it was made just now."""
        try:
            return optuna.create_study(storage=self._storage, study_name=_PREFIX + name), True
        except DuplicatedStudyError:
            return optuna.load_study(storage=self._storage, study_name=_PREFIX + name), False


def _ignored(_text: str) -> None:
    return
