"""The kinds of values that options have, and how texts become them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from ensemble_kd.errors import Problem
from ensemble_kd.names import label_of


def split_list(value: Any) -> Any:
    """`a,b` or a list of such texts to a list; `none` is the empty list."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        parts = [part.strip() for item in value for part in item.split(",") if part.strip()]
        return [] if parts == ["none"] else parts
    return value


def numbers(value: Any) -> Any:
    """`1,2` to a list of numbers."""
    if isinstance(value, str):
        return [part for part in value.split(",") if part.strip()]
    return value


def by_name(value: Any) -> Any:
    """`4` stays a number, `resnet18=2,vgg16=6` becomes a table; names may be those of --teachers, or short."""
    if isinstance(value, (list, tuple)):
        value = ",".join(str(item) for item in value)
    if isinstance(value, str) and "=" in value:
        pairs = (part.partition("=") for part in value.split(",") if part.strip())
        value = {name.strip(): number for name, _, number in pairs}
    return {label_of(str(name)): item for name, item in value.items()} if isinstance(value, dict) else value


def no_truth(value: Any) -> Any:
    """Refuse True and False where a number is wanted: Python would take them for 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("truth", "it should be a number, not a truth value")
    return value


Number = BeforeValidator(no_truth)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), Number]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), Number]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), Number]
Part = Annotated[float, Field(gt=0, lt=1), Number]
Count = Annotated[int, Field(ge=1), Number]
Seed = Annotated[int, Field(ge=0, lt=1 << 63), Number]
Names = Annotated[list[str], BeforeValidator(split_list)]
Files = Annotated[dict[str, Path], BeforeValidator(by_name)]
PerTeacher = Annotated[Positive | dict[str, Positive], BeforeValidator(by_name)]
Sizes = Annotated[dict[str, Count], BeforeValidator(by_name)]


class Options(BaseModel):
    """Base of all options: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def cross_checks(self) -> list[tuple[set[str], Problem]]:
        """Problems between fields: which fields each concerns, and what is wrong."""
        return []
