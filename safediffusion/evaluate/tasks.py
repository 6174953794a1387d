"""What a model can be measured on, by name."""

from __future__ import annotations

import difflib

from safediffusion.errors import UserError

TASKS = {
    "pictograms": "the embedded world: unsafe rates on seen, unseen and implicit prompts, composition, content kept, alignment, diversity, drift",
}


def check_tasks(names: str) -> tuple[str, ...]:
    """The tasks of a comma list. UserError names the near miss."""
    chosen = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in chosen:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1)
            raise UserError(f"there is no task {name!r}; " + (f"did you mean {near[0]}?" if near else f"the tasks are {', '.join(TASKS)}"))
    if not chosen:
        raise UserError(f"--tasks names no task; the tasks are {', '.join(TASKS)}")
    return chosen
