"""Pydantic's complaints in a user's words: key path, what was given, what is allowed. Knows no file and no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, get_args

from pydantic import BaseModel, ValidationError

from autoprune.errors import near_miss

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

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
    """All problems of `error` as (dotted key, text), in the order of the file."""
    return [(dotted(item["loc"]), _text(item, model)) for item in error.errors()]


def dotted(location: tuple[int | str, ...]) -> str:
    """`("search", "trials")` as `search.trials`; names that hold dots themselves are quoted."""
    parts = [repr(part) if isinstance(part, str) and "." in part else str(part) for part in location]
    return ".".join(parts) or "(top)"


def given(value: object) -> str:
    """`value` as a user would recognise it, cut to a readable length."""
    text = "nothing" if value is None else "a mapping" if isinstance(value, Mapping) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _text(item: ErrorDetails, model: type[BaseModel]) -> str:
    kind, value = item["type"], item["input"]
    if kind == "extra_forbidden":
        return f"unknown key; {near_miss(str(item['loc'][-1]), _keys_at(model, item['loc'][:-1]))}"
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return item["msg"].removeprefix("Value error, ")
    if kind == "literal_error":
        return f"given {given(value)}, allowed: {item['ctx']['expected']}"
    if kind in _EXPECTED:
        return f"given {given(value)}, allowed: {_EXPECTED[kind]}"
    message = item["msg"].removeprefix("Input should be ").removeprefix("Input should ")
    return f"given {given(value)}, allowed: {message}"


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
