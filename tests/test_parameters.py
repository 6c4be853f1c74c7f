"""Typed parameters: what is accepted, and what every refusal says."""

from dataclasses import dataclass

import pytest

from batchpilot.agents.parameters import ConfigError, Parameters, parameter


@dataclass(frozen=True)
class Oven(Parameters):
    temperature: float = parameter(above=0, maximum=300, help="degrees Celsius")
    trays: int = parameter(2, minimum=1, below=5, help="trays inside")
    fan: bool = parameter(False, help="hot air")
    mode: str = parameter("bake", choices=("bake", "grill"), help="heat from where")
    minutes: int | None = parameter(None, minimum=1, help="how long; no end when left out")


def test_text_and_json_values_become_the_declared_types():
    oven = Oven.from_mapping(
        {"temperature": "180", "trays": 3.0, "fan": "true", "minutes": "40"}, where="oven"
    )
    assert oven == Oven(temperature=180.0, trays=3, fan=True, mode="bake", minutes=40)
    assert isinstance(oven.temperature, float)
    assert isinstance(oven.trays, int)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temprature": 180}, "oven: unknown key 'temprature'; allowed: temperature, trays"),
        ({}, "oven: temperature is required"),
        ({"temperature": "hot"}, "oven: temperature='hot' is not a finite number"),
        ({"temperature": float("nan")}, "oven: temperature=nan is not a finite number"),
        ({"temperature": "inf"}, "oven: temperature='inf' is not a finite number"),
        ({"temperature": 0}, "oven: temperature=0.0 must be greater than 0"),
        ({"temperature": 301}, "oven: temperature=301.0 must be at most 300"),
        ({"temperature": 180, "trays": 2.5}, "oven: trays=2.5 is not a whole number"),
        ({"temperature": 180, "trays": 0}, "oven: trays=0 must be at least 1"),
        ({"temperature": 180, "trays": 5}, "oven: trays=5 must be less than 5"),
        ({"temperature": 180, "trays": True}, "oven: trays=True is not a whole number"),
        ({"temperature": 180, "fan": "maybe"}, "oven: fan='maybe' is not true or false"),
        ({"temperature": 180, "mode": "boil"}, "oven: mode='boil' is not one of: bake, grill"),
        ({"temperature": [180]}, "oven: temperature=[180] is not a finite number"),
        ({"temperature": None}, "oven: temperature=None is not a finite number"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_what_is_allowed(values, message):
    with pytest.raises(ConfigError) as refusal:
        Oven.from_mapping(values, where="oven")
    assert message in str(refusal.value)
