"""`python -m lora_nb validate DIR`: the data set doctor in a terminal."""

import argparse
import json
import sys
from pathlib import Path

from .captions import clip_tokenizers
from .dataset import preprocess, read_exclusions, read_overrides, scan, validate, with_overrides
from .errors import UserError
from .events import Progress
from .files import project_root

READY, NOT_READY, WRONG_USAGE = 0, 1, 2


def arguments() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m lora_nb validate", description="Find everything that is wrong with a data set."
    )
    parser.add_argument("folder", metavar="DIR", help="folder or zip with pictures and captions")
    parser.add_argument("--trigger-token", help="the word that will call the character")
    parser.add_argument("--resolution", type=int, default=1024, help="pixels that will be trained at (1024)")
    parser.add_argument("--square", action="store_true", help="crop to squares instead of buckets")
    parser.add_argument("--resize", action="store_true", help="also write processed pictures and their manifest")
    parser.add_argument(
        "--output", metavar="DIR", help="where manifests are written (outputs/<name of the data set> with --resize)"
    )
    parser.add_argument(
        "--held-out", type=float, default=0.0, metavar="SHARE", help="share of the pictures to keep for evaluation (0)"
    )
    parser.add_argument(
        "--base-model",
        metavar="DIR",
        default="",
        help="diffusers folder whose tokenizers count the captions' tokens (SDXL's)",
    )
    parser.add_argument("--leave-out-errors", action="store_true", help="go on without the pictures that have errors")
    parser.add_argument("--workers", type=int, help="processes that decode (one a core)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def main(argv=None) -> int:
    """Run the command: 0 ready, 1 not ready, 2 wrong usage. argv: without the program and the verb."""
    parser = arguments()
    try:
        options = parser.parse_args(argv)
        if not 16 <= options.resolution <= 4096 or not 0 <= options.held_out < 1:
            parser.error("--resolution lies between 16 and 4096, --held-out between 0 and 1")
        if not Path(options.folder).exists():
            parser.error(f"there is no folder {options.folder}")
    except SystemExit as exit_:  # argparse has said what is wrong
        return exit_.code
    try:
        return _validate(options)
    except UserError as error:
        print(json.dumps({"verdict": "not ready", "sentence": str(error)}) if options.json else error)
        return NOT_READY


def _validate(options) -> int:
    output = (
        Path(options.output) if options.output else project_root() / "outputs" / Path(options.folder).resolve().stem
    )
    on_event = _counter() if sys.stderr.isatty() else lambda event: None
    records = with_overrides(scan(options.folder), read_overrides(output))
    report = validate(
        records,
        options.resolution,
        options.trigger_token,
        square=options.square,
        held_out_share=options.held_out,
        exclusions=read_exclusions(output),
        leave_out_errors=options.leave_out_errors,
        tokenizers=clip_tokenizers(options.base_model),
        workers=options.workers,
        on_event=on_event,
    )
    if options.json:
        print(json.dumps(report.as_json(), indent=2, ensure_ascii=True))
    else:
        print(
            records, report.table(page_size=200), report.numbers(), report.absorption or "", report.verdict, sep="\n\n"
        )
    if report.ready and (options.resize or options.output):
        manifest = report.write(output)
        if options.resize:
            preprocess(manifest, options.workers, on_event=on_event)
        print(f"Written to {output}", file=sys.stderr)
    return READY if report.ready else NOT_READY


def _counter():
    def show(event):
        if isinstance(event, Progress) and (event.done % 10 == 0 or event.done == event.total):
            end = "\n" if event.done == event.total else ""
            print(f"\r{event.stage} {event.done}/{event.total}", end=end, file=sys.stderr, flush=True)

    return show
