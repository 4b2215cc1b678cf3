"""Names of clusters: what is read, and the one line that says what is wrong."""

import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.planning.chips import CHIPS, GIB, parse_topology


@pytest.mark.parametrize(
    ("text", "chips", "devices"),
    [
        ("v5p:8x8x16", 1024, 1024),
        ("v6e:16x16", 256, 256),
        ("v5e:2x2", 4, 4),
        ("tpu7x:4x8x8", 256, 512),  # two devices a chip
        ("h100:128", 128, 128),
        ("h200:8x16", 128, 128),
        ("h200:4", 4, 4),
    ],
)
def test_sizes(text, chips, devices):
    topology = parse_topology(text)
    assert (topology.chips, topology.devices) == (chips, devices)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("v5q:8x8x16", r"'v5q:8x8x16': chip must be one of v5e, .*\(did you mean 'v5p'\?\)"),
        ("tpu7:4x4x4", r"did you mean 'tpu7x'"),
        ("v5p:8x8", r"must have 3 sizes, as in v5p:2x4x8"),
        ("v5p", r"must be a chip and sizes, as in v5p:2x4x8"),
        ("v6e:16x-1", r"must be a chip and sizes, as in v6e:2x4"),
        ("h100:12", r"12 GPUs must fill nodes of 8"),
        ("h100:4x16", r"must be GPUs or 8xNODES"),
    ],
)
def test_what_is_wrong_is_said(text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_topology(text)


def test_peaks_are_those_of_the_data_sheets():
    assert CHIPS["v5p"].peak == 459e12
    assert CHIPS["tpu7x"].peak * CHIPS["tpu7x"].devices == 2307e12
    assert CHIPS["tpu7x"].hbm * CHIPS["tpu7x"].devices == 192 * GIB
    # Both directions of all links, as published.
    published = {"v5e": 400, "v5p": 1200, "v6e": 800, "tpu7x": 1200}
    for name, both_ways in published.items():
        chip = CHIPS[name]
        assert 2 * chip.link * chip.links * chip.devices == both_ways * 1e9
