from __future__ import annotations

import re

import pytest

from spectral_callbacks import tags


@pytest.mark.parametrize("tag", ["sharpness/lambda_max", "cost/overhead", "weights/alpha/layers.0.attn-out", "a/B_9"])
def test_letters_digits_and_four_marks_make_a_tag(tag: str) -> None:
    assert tags.check_tag(tag) == tag


@pytest.mark.parametrize(
    "tag",
    [
        "",
        "sharpness",
        "/lambda_max",
        "sharpness/",
        "sharpness//lambda_max",
        "sharpness/lambda max",
        "sharpness/λ",
        "sharpness/a:b",
        "sharpness/a\n",
        "sharpness/lambda_max/",
    ],
)
def test_anything_else_is_refused_by_name(tag: str) -> None:
    with pytest.raises(ValueError, match=rf"tag {re.escape(repr(tag))} must read <diagnostic>/<quantity>.* Rename it"):
        tags.check_tag(tag)


def test_renaming_replaces_the_diagnostic_only() -> None:
    assert tags.rename("sharpness/lambda_max", "eval") == "eval/lambda_max"
    assert tags.rename("weights/alpha/layers.0", "late") == "late/alpha/layers.0"


def test_a_chart_draws_its_tags_and_no_other() -> None:
    chart = tags.Chart("edge", ("sharpness/lambda_2", "sharpness/layer.1"))
    drawn = tags.layout({"sharpness": (chart, tags.Chart("ratio", ("sharpness/ratio",)))})
    assert list(drawn) == ["sharpness"]
    assert list(drawn["sharpness"]) == ["edge", "ratio"]
    kind, patterns = drawn["sharpness"]["edge"]
    assert kind == "Multiline"
    assert isinstance(patterns, list)
    for pattern, tag in zip(patterns, chart.tags, strict=True):
        assert re.search(pattern, tag)
        assert not re.search(pattern, f"{tag}0")
        assert not re.search(pattern, f"x{tag}")
        assert not re.search(pattern, tag.replace(".", "x").replace("lambda_", "lambda-"))


def test_the_tag_of_the_cost_is_one() -> None:
    assert tags.check_tag(tags.COST_OVERHEAD.name) == "cost/overhead"
    assert tags.COST_OVERHEAD.unit == "1"
    assert tags.COST_OVERHEAD.meaning
