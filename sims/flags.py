"""Flags from dataclass fields: name, default, help and unit of an option are written once, where the field is declared.

A field made by :func:`flag` is an option of every command that calls :func:`add_fields` on its class, and a line of the
class's docstring (:func:`documented`). Axes take one value, a list (``2,4,8``) or a range (``geom:0.05:2:12``,
``lin:0:1:5``: start, stop, number of points, both ends included). Nothing here imports JAX, so ``--help`` is fast.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import textwrap
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple, TypeVar

__all__ = [
    "AXIS",
    "Flag",
    "add_fields",
    "documented",
    "flag",
    "flag_of",
    "given",
    "parse_bools",
    "parse_bytes",
    "parse_floats",
    "parse_ints",
    "parse_names",
    "parse_out",
    "parse_shard",
]

T = TypeVar("T", int, float)
C = TypeVar("C", bound=type)

MAX_POINTS = 100_000
"""Points of a range."""

AXIS = "a value, a list 1,2,4 or a range geom:START:STOP:NUM / lin:START:STOP:NUM"


class Flag(NamedTuple):
    """The command-line option of a dataclass field."""

    help: str
    """One line, with unit and range; the default is appended."""
    group: str
    """Title of its group in ``--help``; empty for the command's own options."""
    options: dict[str, Any]
    """Further keywords of :meth:`argparse.ArgumentParser.add_argument`: ``type``, ``metavar``, ``choices``, ..."""


def flag(default: Any, help: str, *, group: str = "", **options: Any) -> Any:
    """A dataclass field that is also an option of the command line.

    Args:
        default: the field's default, shown in ``--help``.
        help: one line that names unit and range.
        group: title under which ``--help`` lists it.
        options: keywords of ``add_argument``; ``type`` defaults to the type of the default, and a boolean becomes
            ``--name`` and ``--no-name``. ``name`` is the option, such as ``--sigma``, where it is not the field's name.
    """
    return dataclasses.field(default=default, metadata={"flag": Flag(help, group, options)})


def flag_of(field: dataclasses.Field[Any]) -> Flag | None:
    """The :class:`Flag` of a field; None if it is no option."""
    return field.metadata.get("flag")


def documented(cls: C) -> C:
    """Append an ``Args:`` section to the docstring of a dataclass, one line for each field made by :func:`flag`."""
    lines = [inspect.getdoc(cls) or "", "", "Args:"]
    for field in dataclasses.fields(cls):
        if (option := flag_of(field)) is not None:
            shown = _default(field.default)
            text = f"{field.name}: {option.help}{f' (default: {shown})' if shown else ''}."
            lines += textwrap.wrap(text, 116, initial_indent="    ", subsequent_indent="        ")
    cls.__doc__ = "\n".join(lines)
    return cls


def add_fields(
    parser: argparse.ArgumentParser,
    cls: type,
    *,
    leave_out: Container[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Add an option for each field of the dataclass ``cls`` made by :func:`flag`; returns argparse's groups by title.

    An option that is not given is None, so that :func:`given` can distinguish it from the default. ``leave_out`` names
    fields without an option; ``defaults`` are the command's own, shown in place of the class's.
    """
    groups: dict[str, Any] = {"": parser}
    for field in dataclasses.fields(cls):
        option = flag_of(field)
        if option is None or field.name in leave_out:
            continue
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        default = (defaults or {}).get(field.name, field.default)
        options = dict(option.options)
        if isinstance(field.default, bool):
            options.setdefault("action", argparse.BooleanOptionalAction)
        elif "action" not in options and "choices" not in options and field.default is not None:
            options.setdefault("type", type(field.default))
        shown = _default(default)
        text = f"{option.help} (default: {shown})" if shown else option.help
        name = options.pop("name", f"--{field.name.replace('_', '-')}")
        groups[option.group].add_argument(name, dest=field.name, default=None, help=text.replace("%", "%%"), **options)
    return groups


def given(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of ``cls`` that the command line sets."""
    values = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if value is not None}


def parse_floats(text: str) -> tuple[float, ...]:
    """``0.1,0.2`` or ``geom:0.05:2:12`` or ``lin:0:1:5`` as floats (ranges rounded to 6 significant digits)."""
    return _parse_axis(text, float, lambda x: float(f"{x:.6g}"))


def parse_ints(text: str) -> tuple[int, ...]:
    """As :func:`parse_floats`, rounded to integers; points of a range that round alike are merged."""
    return _parse_axis(text, int, lambda x: round(float(x)))


def parse_names(text: str) -> tuple[str, ...]:
    """``adam,sgd`` as names; ``none`` is the empty name."""
    return tuple("" if name == "none" else name for name in text.split(","))


def parse_bools(text: str) -> tuple[bool, ...]:
    """``true``, ``false`` or both with a comma between."""
    try:
        return tuple({"true": True, "false": False}[word] for word in text.lower().split(","))
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} must be true, false or false,true") from None


def parse_bytes(text: str) -> int:
    """A memory size such as ``500MB``, ``2GiB`` or a plain number of bytes."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.strip().rstrip("bBkKmMgGiI ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = float(number) * units[unit]
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write for example 500MB or 2GiB") from None
    if not 1 <= size < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range; give at least one byte")
    return int(size)


def parse_out(text: str) -> str:
    """The name of a folder to write to, which must not be empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name of the folder is empty; write for example runs/mine")
    return text


def parse_shard(text: str) -> tuple[int, int]:
    """``"3/8"`` as (3, 8); an error of argparse unless 1 <= I <= N."""
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        index = count = 0
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError(f"a shard is I/N with 1 <= I <= N, such as 3/8; got {text!r}.")
    return index, count


def _parse_axis(text: str, kind: type[T], rounded: Callable[[float], T]) -> tuple[T, ...]:
    # NumPy takes a tenth of a second to import: help texts do without.
    import numpy as np

    name, _, rest = text.partition(":")
    try:
        if name in ("geom", "lin"):
            begin, end, count = rest.split(":")
            if int(count) > MAX_POINTS:
                raise argparse.ArgumentTypeError(f"{text!r} has more than {MAX_POINTS:,} points")
            if int(count) < 1 or (name == "geom" and (float(begin) <= 0 or float(end) <= 0)):
                raise ValueError
            if not all(math.isfinite(float(x)) for x in (begin, end)):
                raise ValueError
            points = (np.geomspace if name == "geom" else np.linspace)(float(begin), float(end), int(count))
            return tuple(dict.fromkeys(rounded(x) for x in points))
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an axis of {kind.__name__}s; write 1,2,4 or geom:1:100:5 or lin:0:1:5"
        ) from None


def _default(value: Any) -> str:
    """A default as it would be typed; empty where there is none to show."""
    if value is None or value == "" or value == () or value is dataclasses.MISSING or isinstance(value, bool):
        return ""
    if isinstance(value, (tuple, list)):
        return ",".join(str(item).lower() if isinstance(item, bool) else _default(item) or "none" for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
