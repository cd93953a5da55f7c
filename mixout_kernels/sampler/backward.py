"""The end of a backward, for what must not happen within it."""

from __future__ import annotations

from collections.abc import Callable

import torch


class EndOfBackward:
    """Calls ``action`` when the backward at work has ended: the outermost one, where they are nested.

    Reentrant checkpointing runs a backward for each segment within the one of the whole model, and autograd tells only
    of the inner ones. But it first calls the segment's layers again, within the outer one: so every forward is noted.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self._awaited: int | None = None  # the backward at whose end the action is called

    def note_forward(self) -> None:
        task = torch._C._current_graph_task_id()
        if task == -1:
            self._awaited = None  # if there was one, it failed: autograd then calls nothing
        elif self._awaited is None:
            self._wait_for(task)

    def wait(self) -> bool:
        """Whether a backward is at work: the action then follows at its end."""
        task = torch._C._current_graph_task_id()
        if task != -1 and self._awaited is None:
            self._wait_for(task)
        return task != -1

    def _wait_for(self, task: int) -> None:
        self._awaited = task
        torch.autograd.Variable._execution_engine.queue_callback(self._ended)

    def _ended(self) -> None:
        self._awaited = None
        self._action()
