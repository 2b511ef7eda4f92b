"""The help of a program, from the dataclass of its options and the comments in its source."""

import inspect
import re
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, Literal, get_origin


def help_text(cls: type, describe: Callable[[Any], str], everything: bool = True) -> str:
    """Return the options of `cls`, then those it inherits, with the comments in the source as their meaning.

    `describe` says which values a type allows. Without `everything` only those whose comment begins with
    `#:`, if `cls` itself has any, and of the program's docstring only the commands.
    """
    module = inspect.getmodule(cls)
    about = inspect.cleandoc((module.__doc__ if module else None) or "")
    defaults = {field.name: field.default for field in fields(cls)}
    types = typing.get_type_hints(cls, include_extras=True)
    sources = [inspect.getsource(base) for base in cls.__mro__ if base is not object]
    source = "\n".join(sources)
    if everything or "  #: " not in sources[0]:
        shown, end = set(defaults), ""
    else:
        shown = set(re.findall(r"(?m)^    (\w+): .*?  #: ", source))
        end = f"\n\n--help=all shows all {len(defaults)} options."
        about = "\n\n".join(about.split("\n\n")[:2])
    lines = [about, "", "Options (--name=value):"]
    for line in source.splitlines():
        if (heading := re.match(r"    # (.+)", line)) and not end:
            lines.append(f"\n  {heading[1]}")
        elif (option := re.match(r"    (\w+): .*?  #:? (.+)", line)) and option[1] in shown:
            shown.remove(option[1])  # a field that the class gives another default comes again with its base
            default = "" if defaults[option[1]] is MISSING else f"={defaults[option[1]]!r}"
            lines.append(f"    --{option[1] + default:<38} {option[2]}")
            if get_origin(types[option[1]]) is Literal:
                lines.append(f"      {'':<38} {describe(types[option[1]])}")
    return "\n".join(lines) + end
