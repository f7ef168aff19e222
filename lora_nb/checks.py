"""What a proof found: one file through one program, and the table of a whole export."""

import html
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_nb.errors import UserError
from lora_nb.files import write_json
from lora_nb.lora_file import LoraModule, change_norm, relative_difference

PROOF_FILE = "proof.json"
# A module need not be exact in itself where it changes its weight by less than this share of what the median module
# does, or by less than this much on average, which no program that holds weights in half precision could apply.
NEGLIGIBLE_SHARE, NEGLIGIBLE_CHANGE = 1e-3, 1e-7
_COLUMNS = ("file", "read by", "modules", "worst error", "limit", "verdict")


@dataclass(frozen=True)
class Check:
    """One file seen through one program: modules found of those trained, and the worst relative error of a change."""

    file: str
    program: str
    found: int
    total: int
    error: float | None = None
    limit: float | None = None
    note: str = ""

    @property
    def ok(self) -> bool:
        """Nothing to compare (`total` 0: a proof that could not be made) is no failure, and is said in `note`."""
        close = self.error is None or (math.isfinite(self.error) and self.error <= self.limit)
        return self.found == self.total and close


@dataclass(frozen=True)
class Road:
    """Another way back from a file to LoRA modules; `formats` are those that it can read."""

    name: str
    formats: tuple[str, ...]
    read: Callable[[Path], list[LoraModule]]

    def check(self, path: Path, expected: list[LoraModule], limit: float) -> Check:
        """Compare what this road finds in `path` with the trained modules."""
        try:
            got = {(module.part, module.path): module for module in self.read(path)}
        except Exception as error:  # whatever a reader trips over is a failed proof, never a lost training run
            return Check(path.name, self.name, 0, len(expected), note=f"{type(error).__name__}: {error}"[:200])
        floor = NEGLIGIBLE_SHARE * statistics.median(change_norm(module) for module in expected)
        errors = [
            relative_difference(module, got[key], max(floor, NEGLIGIBLE_CHANGE * math.sqrt(module.size)))
            for module in expected
            if (key := (module.part, module.path)) in got
        ]
        if len(got) > len(errors):
            return Check(path.name, self.name, 0, len(expected), note=f"{len(got) - len(errors)} modules too many")
        return Check(path.name, self.name, len(errors), len(expected), max(errors, default=math.inf), limit)


@dataclass(frozen=True, repr=False)
class ExportResult:
    """What lies in `folder`, and how each file proved itself. Shows as a table in a notebook and in a terminal."""

    folder: Path
    files: tuple[Path, ...]
    checks: tuple[Check, ...]
    rejected: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.rejected and all(check.ok for check in self.checks)

    def save(self, path) -> Path:
        """Keep the table as JSON; `read_result` brings it back."""
        return write_json(path, {"checks": [asdict(check) for check in self.checks], "rejected": list(self.rejected)})

    def rows(self) -> list[tuple[str, ...]]:
        """file, program, modules, worst relative error of a module, its limit, verdict."""
        return [
            (
                check.file,
                check.program,
                f"{check.found} of {check.total}" if check.total else "",
                "" if check.error is None else f"{check.error:.1e}",
                "" if check.limit is None else f"{check.limit:.0e}",
                _verdict(check) + (f" ({check.note})" if check.note else ""),
            )
            for check in self.checks
        ]

    def __str__(self) -> str:
        table = [_COLUMNS, *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(len(_COLUMNS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
        lines += [f"{name} failed its proof and was not kept." for name in self.rejected]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in row[:-1])
            + f"<td style='text-align:left;color:{'#067d17' if check.ok else '#b00020'}'>{html.escape(row[-1])}</td></tr>"
            for row, check in zip(self.rows(), self.checks, strict=True)
        )
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name in _COLUMNS)
        lost = "".join(f"<p>{html.escape(name)} failed its proof and was not kept.</p>" for name in self.rejected)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table>{lost}"


def _verdict(check: Check) -> str:
    return "not made" if not check.total else "ok" if check.ok else "FAILED"


def read_result(folder) -> ExportResult:
    """The proof that `export_lora` left in `folder`, for a kernel that did not train. Raises UserError without one."""
    folder = Path(folder)
    try:
        saved = json.loads((folder / PROOF_FILE).read_text(encoding="utf-8"))
        checks = tuple(Check(**check) for check in saved["checks"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no readable {PROOF_FILE}; export the run again.") from error
    names = dict.fromkeys(check.file for check in checks)
    return ExportResult(folder, tuple(folder / name for name in names if (folder / name).exists()), checks, tuple(saved["rejected"]))
