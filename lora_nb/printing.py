"""Events as plain lines, for notebooks that run headlessly and for terminals: bars would log only their first state."""

import time

from lora_nb.events import Notice, Progress


def printer(every_s: float = 10.0):
    """An `on_event` that prints notices, and of each stage its end and a line every `every_s` seconds."""
    last: dict[str, float] = {}

    def on_event(event):
        if isinstance(event, Notice):
            print(event.message)
        elif isinstance(event, Progress):
            began = last.setdefault(event.stage, time.monotonic())
            if time.monotonic() - began >= every_s:
                print(f"{event.stage}: {event.done} of {event.total}" + (f" ({event.note})" if event.note else ""))
                last[event.stage] = time.monotonic()

    return on_event
