"""The command ``rlaif``: parse first, then load what the subcommand needs, then call one function.

Nothing heavy is imported before the options are parsed, so ``--help`` answers at once; option
classes live in modules that import neither torch nor vllm.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import typing
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from feedback.config import option_values, recipe_table, required_fields
from feedback.errors import RecipeError, RlaifError, nearest
from train.commands import COMMANDS, load

__all__ = ["main", "parse_options"]

# Options that some training commands have, and these do not.
_ABSENT = {
    ("rrhf", "engine"): "rrhf has only the packed engine",
    ("ppo", "engine"): "ppo has only the packed engine",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; return the exit code."""
    try:
        try:
            return _main(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has gone (``| head``). Python flushes once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _main(arguments: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(version("rlaif"))
        return 0
    try:
        return _run(words[0], words[1:])
    except RlaifError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            "interrupted: everything finished so far is on disk; run the same command to continue",
            file=sys.stderr,
        )
        return 130


def _run(name: str, words: list[str]) -> int:
    if name not in COMMANDS:
        raise RecipeError(
            f"unknown command {name!r}{nearest(name, COMMANDS)} (rlaif --help lists them)"
        )
    command = COMMANDS[name]
    options = parse_options(load(command.options), name, words)
    result = load(command.function)(options)
    return result if isinstance(result, int) else 0


def parse_options(kind: type[Any], name: str, words: list[str]) -> Any:
    """Return the options of command ``name``: the recipe's table first, then the command line.

    Raises:
        RecipeError: an option is unknown (names the nearest) or a required one is missing.
    """
    import tyro

    recipe, words = _take_recipe(_name_first(kind, words))
    table = {} if recipe is None else recipe_table(recipe, name)
    if name in ("run", "compare") and recipe is not None:
        table = {**table, "recipe": recipe}
    for key in table:
        _check_present(name, key, recipe)
    default = _with_missing(kind, table, recipe)
    if not {"-h", "--help"} & set(words):
        _check_words(kind, name, words, given=set(table))
    return tyro.cli(
        kind,
        args=_bare_flags(kind, words),
        prog=f"rlaif {name}",
        default=default,
        description=COMMANDS[name].help,
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )


def _check_words(kind: type[Any], name: str, words: list[str], *, given: set[str]) -> None:
    known = _option_names(kind)
    used = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    for option in sorted(used):
        if option not in known:
            _check_present(name, option.removeprefix("--"))
            raise RecipeError(
                f"rlaif {name}: unknown option {option}{nearest(option, known)} "
                f"(rlaif {name} --help lists them)"
            )
    _check_numbers(kind, name, words)
    filled = {f"--{key}".replace("_", "-") for key in given} | used
    needed = [f"--{key}".replace("_", "-") for key in required_fields(kind)]
    if missing := [option for option in needed if option not in filled]:
        raise RecipeError(f"rlaif {name} needs {', '.join(missing)} (or a --recipe that has them)")


def _check_present(name: str, option: str, recipe: str | None = None) -> None:
    """Refuse an option that only other commands have, in words of its own."""
    absent = _ABSENT.get((name, option.replace("-", "_")))
    if absent is not None:
        raise RecipeError(f"{absent}: leave {option} out", path=recipe)


def _check_numbers(kind: type[Any], name: str, words: list[str]) -> None:
    """Refuse words where an option takes one number."""
    wanted = {option: _number_type(hint) for option, hint in _option_types(kind)}
    for place, word in enumerate(words):
        option, _, value = word.partition("=")
        number = wanted.get(option.replace("_", "-"))
        value = value or "".join(words[place + 1 : place + 2])
        if number is None or not value or value == "None":
            continue
        try:
            number(value)
        except ValueError:
            what = "a whole number" if number is int else "a number"
            raise RecipeError(f"rlaif {name}: {option} takes {what}, not {value!r}") from None


def _number_type(hint: Any) -> type[int] | type[float] | None:
    """Return int or float for a type of one number, which may be None; for others, None."""
    for number in (int, float):
        if hint in (number, number | None):
            return number
    return None


def _option_names(kind: type[Any], prefix: str = "--", *, of: type | None = None) -> list[str]:
    """Return every option of an options class (or those of one type); nested are joined by dots."""
    return [name for name, hint in _option_types(kind, prefix) if of is None or hint is of]


def _option_types(kind: type[Any], prefix: str = "--") -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(kind)
    for entry in dataclasses.fields(kind):
        name, hint = prefix + entry.name.replace("_", "-"), hints[entry.name]
        yield name, hint
        if dataclasses.is_dataclass(hint):
            yield from _option_types(typing.cast(type[Any], hint), f"{name}.")


def _with_missing(kind: type[Any], table: dict[str, Any], recipe: str | None) -> Any:
    """Return a recipe table's options; what it lacks stays for the command line.

    Nothing is checked yet: the command line may hold what makes the recipe's options work.
    """
    import tyro

    values = option_values(kind, table, path=recipe)
    options = object.__new__(kind)
    for entry in dataclasses.fields(kind):
        default = entry.default
        if entry.default_factory is not dataclasses.MISSING:
            default = entry.default_factory()
        if default is dataclasses.MISSING:
            default = tyro.MISSING
        object.__setattr__(options, entry.name, values.get(entry.name, default))
    return options


def _name_first(kind: type[Any], words: list[str]) -> list[str]:
    """Let the first options go without their names: ``report runs/x/verdicts``, ``diff old new``.

    Bare words go to the first option and to the required ones after it, one each; an option that
    takes several takes them all.
    """
    bare = next((n for n, word in enumerate(words) if word.startswith("-")), len(words))
    hints = typing.get_type_hints(kind)
    named: list[str] = []
    for place, entry in enumerate(dataclasses.fields(kind)):
        if not words[:bare] or (place and entry.name not in required_fields(kind)):
            break
        taken = bare if typing.get_origin(hints[entry.name]) is tuple else 1
        named += [f"--{entry.name.replace('_', '-')}", *words[:taken]]
        words, bare = words[taken:], bare - taken
    return [*named, *words]


def _bare_flags(kind: type[Any], words: list[str]) -> list[str]:
    """Let ``--dry-run`` stand for ``--dry-run True``."""
    flags = set(_option_names(kind, of=bool))
    given: list[str] = []
    for place, word in enumerate(words):
        following = words[place + 1] if place + 1 < len(words) else "--"
        given.append(word)
        if word.replace("_", "-") in flags and following.startswith("--"):
            given.append("True")
    return given


def _take_recipe(words: list[str]) -> tuple[str | None, list[str]]:
    rest, recipe, index = [], None, 0
    while index < len(words):
        word = words[index]
        if word == "--recipe":
            if index + 1 >= len(words):
                raise RecipeError("--recipe needs a file")
            recipe, index = words[index + 1], index + 2
        elif word.startswith("--recipe="):
            recipe, index = word.partition("=")[2], index + 1
        else:
            rest.append(word)
            index += 1
    return recipe, rest


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rlaif COMMAND [--recipe FILE.toml] [options]",
            "",
            "AI feedback that can be trusted, and training that uses every bit of it.",
            "",
            "commands:",
            *lines,
            "",
            "rlaif COMMAND --help lists a command's options.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
