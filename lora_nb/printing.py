"""Events as plain lines, for notebooks that run headlessly and for terminals: bars would log only their first state."""

import sys
import time

from tqdm import tqdm

from lora_nb.events import Notice, Progress, Saved, Stepped, Validated


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


def training_printer(max_steps: int, every_s: float = 10.0):
    """An `on_event` for a training in a terminal: a bar, or plain lines where the output is a file."""
    others, bar, last = printer(every_s), None, time.monotonic()

    def on_event(event):
        nonlocal bar, last
        if isinstance(event, Stepped) and sys.stderr.isatty():
            bar = bar or tqdm(total=max_steps, initial=event.step - 1, unit="step")
            bar.set_postfix(loss=f"{event.loss:.4f}", refresh=False)
            bar.update()
        elif isinstance(event, Stepped):
            if time.monotonic() - last >= every_s or event.step == max_steps:
                print(f"step {event.step} of {max_steps}: loss {event.loss:.4f}, {1000 * event.seconds:.0f} ms", flush=True)
                last = time.monotonic()
        elif isinstance(event, Saved | Validated):
            pass  # their folders are told at the end
        else:
            with tqdm.external_write_mode():  # between two states of the bar, not into it
                others(event)
        if bar is not None and isinstance(event, Stepped) and event.step == max_steps:
            bar.close()

    return on_event
