"""What `sharpwatch measure` can be asked for. Free of torch, so that a mistyped option is answered at once."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from sharpwatch.blocks import BLOCKS
from sharpwatch.cli.arguments import count

ESTIMATORS = ("gnb", "hutchinson", "lanczos", "spectrum", "direction", "linesearch", "preconditioned")
_USUAL = ESTIMATORS[:3]
METHODS = ("auto", "autograd", "differences")
DTYPES = ("float64", "float32", "bfloat16", "float16")
PICTURES = (".svg", ".png", ".pdf")
STANDARD_OUTPUT = Path("-")


@dataclass(frozen=True, slots=True)
class Request:
    """One command line, checked. None is what was not said."""

    model: str
    data: str
    estimators: tuple[str, ...]
    draws: int
    precision: float | None
    max_draws: int
    blocks: tuple[str, ...] | None
    rules: Path | None
    seed: int
    rows: int | None
    length: int | None
    batches: int | None
    device: str | None
    dtype: str | None
    method: str
    json: Path | None
    plot: Path | None
    state: Path | None
    layers: bool
    quiet: bool


def add(parser: argparse.ArgumentParser) -> None:
    """All arguments."""
    parser.add_argument(
        "model", metavar="MODEL", help="a Hugging Face folder, or module:function that returns the model"
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        help="a text; or a batch file, .pt or .safetensors, or module:function: the model's arguments",
    )
    _add_measurement(parser)
    _add_model(parser)
    _add_outputs(parser)


def request(args: argparse.Namespace) -> Request:
    """The command line as a value."""
    return Request(**{field.name: getattr(args, field.name) for field in fields(Request)})


def _add_measurement(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to measure")
    group.add_argument(
        "--estimators",
        metavar="LIST",
        type=_some_of(ESTIMATORS, "estimators"),
        default=_USUAL,
        help=f"of {','.join(ESTIMATORS)} (default: {','.join(_USUAL)}); the last three are of the "
        "optimizer's next step, and need a function that returns one",
    )
    group.add_argument("--draws", metavar="N", type=_several, default=8, help="random draws each (default: 8)")
    group.add_argument(
        "--precision", metavar="P", type=_share, help="draw until each relative standard error is below P, such as 0.05"
    )
    group.add_argument(
        "--max-draws", metavar="N", type=_several, default=256, help="where --precision gives up (default: 256)"
    )
    group.add_argument(
        "--blocks", metavar="LIST", type=_some_of(BLOCKS, "blocks"), help=f"of {','.join(BLOCKS)} (default: all)"
    )
    group.add_argument("--rules", metavar="FILE", type=Path, help="YAML: which parameter is in which block")
    group.add_argument("--seed", metavar="N", type=count, default=0, help="of the draws (default: 0)")
    group.add_argument(
        "--method", choices=METHODS, default="auto", help="how Hessian-vector products are got (default: auto)"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("on what")
    group.add_argument(
        "--rows", metavar="N", type=_positive, help="windows of a text in a batch (default: 8, or what is there)"
    )
    group.add_argument("--length", metavar="N", type=_positive, help="tokens in a window (default: 256, or what fits)")
    group.add_argument(
        "--batches",
        metavar="N",
        type=_positive,
        help="of a text (default: 1), or the first N of those given (default: all)",
    )
    group.add_argument("--device", metavar="NAME", help="such as cpu or cuda:1 (default: the GPU where there is one)")
    group.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: float32; as made, for module:function)"
    )


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to leave")
    group.add_argument("--json", metavar="FILE", type=Path, help="all numbers; - prints them in place of the table")
    group.add_argument("--plot", metavar="FILE", type=_picture, help=f"a figure: {', '.join(PICTURES)}")
    group.add_argument(
        "--state", metavar="FILE", type=Path, help="keeps every draw; where it exists, the measurement goes on from it"
    )
    group.add_argument("--layers", action="store_true", help="a table by layer too")
    group.add_argument("--quiet", action="store_true", help="neither table nor progress")


def _some_of(allowed: tuple[str, ...], what: str) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        named = tuple(dict.fromkeys(text.split(",")))
        wrong = [name for name in named if name not in allowed]
        if wrong:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is not one of the {what}; allowed: {','.join(allowed)}")
        return named

    return parse


def _positive(text: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def _several(text: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text) or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 2 or more: one draw has no standard error")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no relative error; allowed: above 0 and below 1, such as 0.05")
    return value


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text!r} ends in {path.suffix or 'nothing'}; allowed: {', '.join(PICTURES)}")
    return path
