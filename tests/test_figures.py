import math

import pytest

from ncprior.figures import Figure, as_json, from_json, table
from ncprior.terminal import as_text


@pytest.mark.parametrize(
    ("value", "se", "text"),
    [
        (1.23456, None, "1.235"),
        (1.23456, 0.02, "1.235"),
        (1.23456, 0.0004, "1.23456"),
        (123.456, 3.0, "123.5"),
        (1.23456, 0.0, "1.235"),
        (1.23456, math.nan, "1.235"),
        (1.23456789, 1e-9, "1.234568"),
    ],
)
def test_as_many_digits_as_the_error_supports(value, se, text):
    assert Figure(value, "nats", 10, 0, se).text() == text


def test_error():
    assert Figure(1.0, "nats", 10, 0, 0.0213).error() == "± 0.021"
    assert Figure(1.0, "nats", 10, 0, interval=(0.5, 1.5)).error() == "[0.500, 1.500]"
    assert Figure(1.0, "nats", 10, 0).error() == Figure(1.0, "nats", 10, 0, math.nan).error() == ""


def test_small_p_values_are_not_zero():
    assert Figure(1e-9, "p-value", 10, 0).text() == "< 0.001"
    assert Figure(0.0301, "p-value", 10, 0).text() == "0.030"


def test_json_round_trip():
    figures = {
        "a": Figure(1.0, "nats", 10, 3, 0.1, note="held out"),
        "b": Figure(2.0, "share", 1, 0, interval=(0.0, 1.0)),
    }
    assert from_json(as_json(figures)) == figures


def test_only_units_wrap():
    figures = {
        "closer_to_train_reconstruction": Figure(0.00104, "share", 10, 0, 0.00046),
        "fd_base": Figure(1.0, "squared, features pca-64 of pixels", 10, 0, 0.1),
    }
    text = as_text(table(figures), 80)
    assert "closer to train reconstruction" in text and "0.00104" in text and "…" not in text
    assert max(map(len, text.splitlines())) <= 80 and text.count("┏") == 1


def test_table_shows_every_field():
    text = as_text(table({"log_z": Figure(0.1234, "nats", 200_000, 0, 0.01)}))
    for word in ("log z", "0.123", "± 0.01", "nats", "200,000"):
        assert word in text
