"""Pydantic's complaints in a user's words: key path, what was given, what is allowed. Knows no file and no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, get_args

from pydantic import BaseModel, ValidationError

from autoprune.errors import near_miss

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MOST_TOLD: Final = 100
"""Problems of a file that are told; of more, how many there are: a file may hold a hundred thousand wrong keys."""

_TEXT_LENGTH: Final = 1000

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
    "list_type": "a list",
    "tuple_type": "a list",
    "finite_number": "a finite number",
}


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[tuple[str, str]]:
    """The problems of `error` as (dotted key, text), in the file's order; the last one may count those left out."""
    found = error.errors(include_url=False)
    told = [(dotted(item["loc"]), _text(item, model)) for item in found[:MOST_TOLD]]
    return [*told, ("(top)", f"and {len(found) - len(told)} more problems")] if len(told) < len(found) else told


def dotted(location: tuple[int | str, ...]) -> str:
    """`("search", "trials")` as `search.trials`; names that hold dots themselves are quoted."""
    parts = [repr(part[:80]) if isinstance(part, str) and "." in part else shown(str(part)) for part in location]
    return ".".join(parts) or "(top)"


def given(value: object) -> str:
    """`value` as a user would recognise it, cut to a readable length."""
    if isinstance(value, str | bytes | list | tuple):
        value = value[:80]  # as much as is told; the rest need not be written
    text = "nothing" if value is None else "a mapping" if isinstance(value, Mapping) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def shown(key: str) -> str:
    """A key as it is told: not too long, and nothing that a terminal would obey."""
    return key[:80] if key.isprintable() else ascii(key[:80])


def _text(item: ErrorDetails, model: type[BaseModel]) -> str:
    kind, value = item["type"], item["input"]
    if kind == "extra_forbidden":
        return f"unknown key; {near_miss(str(item['loc'][-1]), _keys_at(model, item['loc'][:-1]))}"
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return item["msg"].removeprefix("Value error, ")[:_TEXT_LENGTH]
    if kind == "literal_error":
        return f"given {given(value)}, allowed: {item['ctx']['expected']}"
    if kind in _EXPECTED:
        return f"given {given(value)}, allowed: {_EXPECTED[kind]}"
    message = item["msg"].removeprefix("Input should be ").removeprefix("Input should ")
    return f"given {given(value)}, allowed: {message[:_TEXT_LENGTH]}"


def _keys_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys allowed at `location` below `model`; a dict's keys are free and skipped over."""
    current = model
    for part in location:
        field = current.model_fields.get(str(part))
        found = _model_in(field.annotation) if field is not None else None
        current = found or current
    return list(current.model_fields)


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(part) for part in get_args(annotation))
    return next((model for model in found if model is not None), None)
