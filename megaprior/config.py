"""Configuration: YAML files plus dotted `key=value` overrides, checked against frozen dataclasses.

    @configclass
    class OptimConfig:
        lr: float = 1e-3

A config class sits beside the component it configures. An unknown key is an error with a suggestion; the resolved
configuration is what a run records.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

from megaprior.errors import UsageError

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def configclass(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass whose values are validated and whose unknown keys are refused."""
    from pydantic import ConfigDict
    from pydantic.dataclasses import dataclass

    return dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(cls)  # type: ignore[return-value]


def load_config(cls: type[T], path: Path | str | None, overrides: list[str] | None = None) -> T:
    """Build `cls` from its defaults, then the YAML file (`extends: other.yaml` first), then `a.b=value` overrides.

    Raises:
        UsageError: a file is missing or no mapping, a key is unknown (with the nearest known one), a value has the wrong type.
    """
    values = _read_yaml(Path(path)) if path is not None else {}
    for override in overrides or []:
        _apply(values, override)
    return build_config(cls, values, source=str(path) if path is not None else "command line")


def build_config(cls: type[T], values: dict[str, Any], *, source: str) -> T:
    """Validate a plain dictionary into `cls`; `source` names it in messages.

    Raises:
        UsageError: as `load_config`.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise UsageError(f"{source}: " + "; ".join(_explain(cls, item) for item in error.errors())) from None


def dump_config(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain values, ready for YAML or JSON."""
    from pydantic import TypeAdapter

    return TypeAdapter(type(config)).dump_python(config, mode="json")


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    import yaml

    if path.resolve() in seen:
        raise UsageError(f"{path}: `extends` goes in a circle")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise UsageError(f"{path}: no such configuration file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a configuration is a mapping of keys to values, this is a {type(values).__name__}")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    return _merge(_read_yaml(path.parent / parent, (*seen, path.resolve())), values)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply(values: dict[str, Any], override: str) -> None:
    import yaml

    name, equals, text = override.partition("=")
    if not equals or not name:
        raise UsageError(f"{override!r}: an override is written key=value, for example optim.lr=1e-3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    *parents, last = name.split(".")
    place: Any = values
    for depth, key in enumerate(parents):
        place = _child(place, key, ".".join(parents[: depth + 1]), create=True)
    if isinstance(place, list):
        place[_position(place, last, name)] = value
    else:
        place[last] = value


def _child(place: Any, key: str, name: str, *, create: bool) -> Any:
    if isinstance(place, list):
        return place[_position(place, key, name)]
    if create and place.get(key) is None:
        place[key] = {}
    if not isinstance(place[key], dict | list):
        raise UsageError(f"{name}: is the value {place[key]!r}, it has no keys below it")
    return place[key]


def _position(place: list[Any], key: str, name: str) -> int:
    if not key.isdigit() or int(key) >= len(place):
        raise UsageError(f"{name}: the list has {len(place)} entries, numbered from 0; there is no entry {key!r}")
    return int(key)


def _explain(cls: type, item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        near = difflib.get_close_matches(str(item["loc"][-1]), _known_keys(cls), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown key {where!r}{hint}"
    if item["type"] == "missing":
        return f"{where!r} is required"
    given = f", got {item['input']!r}" if not isinstance(item["input"], dict) else ""
    return f"{where}: {item['msg']}{given}"


def _known_keys(cls: type) -> list[str]:
    import typing

    names: list[str] = []
    pending, done = [cls], set()
    while pending:
        current = pending.pop()
        if current in done or not dataclasses.is_dataclass(current):
            continue
        done.add(current)
        hints = typing.get_type_hints(current)
        for field in dataclasses.fields(current):
            names.append(field.name)
            hint = hints[field.name]
            pending += [kind for kind in (hint, *typing.get_args(hint)) if isinstance(kind, type)]
    return names
