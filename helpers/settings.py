"""Settings that are data: checked when they are made, frozen, and wrong ones refused in one sentence."""

from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

_PHRASES = {  # how a sentence goes on after the field's name, by pydantic's type of error
    "missing": "must be given",
    "string_type": "must be of type str",
    "int_type": "must be of type int",
    "float_type": "must be of type float",
    "tuple_type": "must be a list",
    "model_type": "must be a table",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than_equal": "must be at most {le:g}",
    "multiple_of": "must be a multiple of {multiple_of:g}",
    "too_short": "must hold at least {min_length}",
}


class Settings(BaseModel):
    """What can be set of something. Raises ValueError with one sentence that names the field and its value.

    Types are strict, except that a float may be given as a whole number and a tuple as a list, as TOML has it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def __init__(self, /, **fields):
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ValueError(self._sentence(error.errors(include_url=False)[0])) from None

    @classmethod
    def _sentence(cls, error: dict) -> str:
        name, *index = error["loc"] or ("",)
        kind, got = cls.__name__.lower(), repr(error["input"])
        if error["type"] == "value_error":  # raised by a check of ours, or by settings within these
            return str(error["ctx"]["error"])
        if error["type"] == "extra_forbidden":
            return f"{kind}: unknown field {name!r}; there are {', '.join(cls.model_fields)}."
        said = _PHRASES.get(error["type"], f"is refused ({error['msg']})").format(**error.get("ctx", {}))
        return f"{kind}.{name}{''.join(f'[{i}]' for i in index)} {said}, got {got}."

    def replace(self, /, **fields) -> Self:
        """A copy with other values in some fields, checked as these were."""
        return type(self)(**{**dict(self), **fields})
