"""What all command lines share: options from a typed model, --dry-run, --overwrite, one message per error.

A stage is a frozen pydantic model of its options and a function `run(options, context)`. `main` turns the fields
into flags, starts the process group, and runs the function, so that every stage behaves alike under python,
deepspeed, torchrun and srun.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from pydantic import Field, ValidationError
from tqdm import tqdm

from mlcd_ds.artefacts.files import remove_file
from mlcd_ds.artefacts.manifest import MANIFEST_NAME, Manifest, ManifestType, read_manifest, refuse_foreign_folder
from mlcd_ds.artefacts.readers import check_size
from mlcd_ds.artefacts.typed import Frozen, shown
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.launch import DEFAULT_TIMEOUT_S, detect_launch, device_of, process_group
from mlcd_ds.distributed.told_once import is_first_to_tell
from mlcd_ds.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, INTERRUPTED, UserError, one_line
from mlcd_ds.stages.os_errors import explain

logger = logging.getLogger("mlcd_ds")
# Ranks that have done their shards wait for the slowest; the launcher, not this timeout, detects dead ranks.
STAGE_TIMEOUT_S = 7 * 86_400.0
EXIT_PEER_ENDED = 1
PEER_ENDED = ("closed by peer", "reset by peer", "Broken pipe")  # gloo's words in a collective


class StageOptions(Frozen):
    """Options that every stage has."""

    out: Path = Field(description="folder that this stage writes; its manifest.json comes last")
    dry_run: bool = Field(False, description="check the inputs, say what would be done, do nothing")
    overwrite: bool = Field(False, description="redo work that is already there, even with other parameters")


OptionsType = TypeVar("OptionsType", bound=StageOptions)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Context:
    """Where a stage runs: its ranks and its device."""

    group: Group
    device: torch.device

    def mine(self, items: Sequence[Item]) -> list[Item]:
        """This rank's share of independent work items, dealt in turn."""
        return list(items[self.group.rank :: self.group.size])

    def progress(self, items: Iterable[Item], total: int, unit: str, what: str) -> Iterable[Item]:
        """Iterate with a bar: on rank 0, and only when somebody watches."""
        return tqdm(items, total=total, unit=unit, desc=what, disable=not (self.group.is_main and sys.stderr.isatty()))


def configure_logging(is_main: bool) -> None:
    """Rank 0 logs everything, the other ranks only errors."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
    logger.setLevel(logging.INFO if is_main else logging.ERROR)


def unwrap_optional(annotation: Any) -> Any:
    """`X | None` -> `X`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(annotation) if arg is not type(None))
    return annotation


def is_main_rank() -> bool:
    """Whether this rank is the one that reports what is the same on all ranks."""
    try:
        return detect_launch().is_main
    except UserError:
        return True


class Parser(argparse.ArgumentParser):
    """A parser whose errors are short, and reported by one rank."""

    def error(self, message: str) -> NoReturn:
        if not is_main_rank():
            sys.exit(EXIT_BAD_INPUT)
        super().error(one_line(message))


def build_parser(options_type: type[StageOptions], name: str, description: str) -> Parser:
    """A flag for every field of the options; the fields' descriptions are the help."""
    parser = Parser(prog=f"mlcd {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it; the environment rules
    for key, field in options_type.model_fields.items():
        annotation, text = unwrap_optional(field.annotation), (field.description or "").replace("%", "%%")
        flag = flag_of(key)
        if annotation is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        many = typing.get_origin(annotation) is tuple
        if not field.is_required() and field.default is not None:
            text += f" (default: {' '.join(map(str, field.default)) if many else field.default})"
        parser.add_argument(
            flag,
            required=field.is_required(),
            default=argparse.SUPPRESS,
            nargs="+" if many else None,
            metavar=key.rsplit("_", 1)[-1].upper(),
            choices=typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else None,
            help=text,
        )
    return parser


def parse_options(options_type: type[OptionsType], parser: Parser, argv: list[str] | None) -> OptionsType:
    """Parse and validate; a bad value ends the program with one message and status 2."""
    values = vars(parser.parse_args(argv))
    values.pop("local_rank", None)
    empty = [flag_of(key) for key, value in values.items() if value == ""]
    if empty:
        parser.error(f"{', '.join(empty)}: the value is empty")
    try:
        return options_type(**values)
    except ValidationError as error:
        problems = [f"{flag_of(str(e['loc'][0]))} {shown(e['input'])}: {e['msg']}" for e in error.errors()]
        parser.error("; ".join(problems))


def flag_of(key: str) -> str:
    """The flag of a field: num_threads is --num-threads."""
    return "--" + key.replace("_", "-")


def main(
    name: str,
    options_type: type[OptionsType],
    run: Callable[[OptionsType, Context], int | None],
    description: str | None,
    argv: list[str] | None = None,
) -> int:
    """Entry of every stage: returns the exit status (0 done, 2 bad input)."""
    options = parse_options(options_type, build_parser(options_type, name, description or ""), argv)
    return guarded(lambda context: run(options, context), STAGE_TIMEOUT_S)


def guarded(run: Callable[[Context], int | None], timeout_s: float = DEFAULT_TIMEOUT_S) -> int:
    """Run with a process group whose collectives wait `timeout_s`.

    A UserError, and what the system refuses about a file, become one message and status 2; Ctrl-C one and status 130.
    A rank whose peer ended says so. All else is a fault of ours and keeps its stack trace.
    """
    status = EXIT_BAD_INPUT
    try:
        launch = detect_launch()
        configure_logging(launch.is_main)
        with process_group(launch, timeout_s) as group:
            status = run(Context(group, device_of(launch))) or 0
    except UserError as error:
        refuse(str(error))
    except OSError as error:
        message = explain(error)
        if message is None:
            raise
        refuse(one_line(message))
    except RuntimeError as error:
        if not any(text in str(error) for text in PEER_ENDED):
            raise
        status = EXIT_PEER_ENDED
        logger.info("another rank ended first; it says why")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # launchers send it again
        status = EXIT_INTERRUPTED
        if is_main_rank():
            logger.error(INTERRUPTED)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Among many, the process ends here: after an error peers may wait in a collective, and after success gloo's
        # threads now and then abort while the interpreter is taken down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def refuse(message: str) -> None:
    """Say what is wrong, once for all ranks."""
    configure_logging(is_main=False)
    if is_first_to_tell(message):
        logger.error("error: %s", message)


def already_done(options: StageOptions, context: Context, kind: type[ManifestType], wanted: Manifest) -> bool:
    """Whether `options.out` holds this stage's finished work with the same inputs and parameters.

    Raises UserError when it holds a finished work with others, unless --overwrite was given. Reads the same on every
    rank. Files are compared by size here; their readers compare the checksums.
    """
    refuse_foreign_folder(options.out, wanted.stage)
    if options.overwrite and not options.dry_run:
        if context.group.is_main:  # so that the folder counts as unfinished if this run is interrupted
            remove_file(options.out / MANIFEST_NAME)
        return False
    if options.overwrite or not (options.out / MANIFEST_NAME).exists():
        return False
    found = read_manifest(options.out, kind, wanted.stage)
    path = options.out / MANIFEST_NAME
    fix = "Choose another --out, or pass --overwrite to redo it."
    parameters = wanted.model_dump(mode="json")["parameters"]  # tuples become lists, as in what JSON gave back
    for key in sorted({*found.parameters, *parameters}):
        was, now = found.parameters.get(key), parameters.get(key)
        if was != now:
            raise UserError(f"{path} was made with {key}={shown(was)}, now {key}={shown(now)}. {fix}")
    for role in wanted.inputs:
        if found.inputs.get(role) != wanted.inputs[role]:
            raise UserError(f"{path} was made from other {role} than those given now. {fix}")
    for name, record in found.files.items():
        check_size(options.out / name, record, "Pass --overwrite to redo it.")
    logger.info("%s: done already, nothing to do (%s)", wanted.stage, options.out)
    return True
