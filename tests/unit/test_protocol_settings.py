# SPDX-License-Identifier: Apache-2.0
"""How settings are resolved and parsed."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_protocol.errors import ConfigError
from tandem_protocol.settings import Parser, parse_bool, parse_float, parse_int, parse_words, resolve, setting, specs_of


@dataclass(frozen=True)
class Example:
    """A component with two settings."""

    size: int = setting(env="EXAMPLE_SIZE", default=1, parse=parse_int(0, 10), help="A size.", unit="bytes")
    name: str = setting(env="EXAMPLE_NAME", default="x", parse=str, help="A name.", flag=False)


@pytest.mark.parametrize(
    ("parameters", "environ", "size"),
    [({}, {}, 1), ({"size": "2"}, {}, 2), ({}, {"EXAMPLE_SIZE": "3"}, 3), ({"size": "2"}, {"EXAMPLE_SIZE": "3"}, 3)],
)
def test_environment_wins_over_parameter_over_default(parameters: dict[str, str], environ: dict[str, str], size: int) -> None:
    """The order is the same for every component."""
    assert resolve(Example, parameters, environ).size == size


def test_an_empty_variable_counts_as_unset() -> None:
    """`VARIABLE= command` is how shells unset a default."""
    assert resolve(Example, {"size": "2"}, {"EXAMPLE_SIZE": ""}).size == 2


def test_unknown_parameters_are_refused() -> None:
    """A typo in config.pbtxt must not pass for a default."""
    with pytest.raises(ConfigError, match=r"unknown parameter 'sise' in config.pbtxt: known are name, size"):
        resolve(Example, {"sise": "2"}, {})


@pytest.mark.parametrize(
    ("parameters", "environ", "source"),
    [({"size": "11"}, {}, r"parameter 'size'='11'"), ({}, {"EXAMPLE_SIZE": "many"}, r"EXAMPLE_SIZE='many'")],
)
def test_a_bad_value_names_where_it_stands(parameters: dict[str, str], environ: dict[str, str], source: str) -> None:
    """The operator must know which of the places to mend."""
    with pytest.raises(ConfigError, match=f"^{source} is not valid: "):
        resolve(Example, parameters, environ)


def test_specs_come_in_order_of_declaration() -> None:
    """Help texts and documentation follow the order of the dataclass."""
    specs = specs_of(Example)
    assert list(specs) == ["size", "name"]
    assert (specs["size"].unit, specs["size"].flag, specs["name"].flag) == ("bytes", True, False)


@pytest.mark.parametrize(("text", "value"), [("true", True), (" YES ", True), ("1", True), ("on", True), ("False", False), ("off", False),
                                             ("0", False), ("no", False)])
def test_booleans_are_read_in_every_usual_form(text: str, value: bool) -> None:
    """Case and blanks don't matter."""
    assert parse_bool(text) is value


@pytest.mark.parametrize(
    ("parse", "text"),
    [(parse_bool, "maybe"), (parse_bool, ""), (parse_int(1, 3), "0"), (parse_int(1, 3), "4"), (parse_int(1, 3), "1.0"),
     (parse_float(0, 1), "-0.1"), (parse_float(0, 1), "1.1"), (parse_float(0, 1), "nan"), (parse_float(0, 1), "inf"),
     (parse_float(0, 1), "x")],
)
def test_parsers_refuse_what_is_out_of_range_or_no_number(parse: Parser, text: str) -> None:
    """ValueError is what `resolve` turns into a sentence."""
    with pytest.raises(ValueError):  # noqa: PT011 - the text is int()'s or float()'s own in half of the cases
        parse(text)


@given(st.integers(1, 1000))
def test_bounds_of_integers_are_inclusive(value: int) -> None:
    """Every value within the bounds comes back."""
    assert parse_int(1, 1000)(str(value)) == value


@pytest.mark.parametrize(
    ("text", "words"), [("nixl lmcache", ("nixl", "lmcache")), ("nixl,lmcache", ("nixl", "lmcache")), (" a , b ", ("a", "b")), ("", ())]
)
def test_words_are_separated_by_blanks_or_commas(text: str, words: tuple[str, ...]) -> None:
    """Order is kept."""
    assert parse_words(text) == words
