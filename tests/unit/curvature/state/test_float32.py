"""Full precision for the time of a measurement, also for code that reads cuDNN's older flag."""

from __future__ import annotations

import pytest
import torch

from sharpwatch.curvature.state.float32 import float32_exact

pytestmark = [
    pytest.mark.filterwarnings("ignore:Please use the new API settings"),
    pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this torch has one setting only"),
]


@pytest.fixture(params=[True, False])
def flag(request):
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = request.param
    yield request.param
    torch.backends.cudnn.allow_tf32 = before


def precisions():
    return [each.fp32_precision for each in (torch.backends.cudnn.conv, torch.backends.cudnn.rnn)]


def test_cudnns_flags_can_be_set_within(flag):
    before = precisions()
    with float32_exact():
        assert torch.backends.cudnn.allow_tf32 is False
        assert precisions() == ["ieee", "ieee"]
        with torch.backends.cudnn.flags(enabled=False):
            assert not torch.backends.cudnn.enabled
        assert torch.backends.cudnn.enabled
        assert "tf32" not in precisions()
    assert torch.backends.cudnn.allow_tf32 == flag
    assert precisions() == before


def test_newer_settings_that_differ_are_put_back():
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, precisions()
    cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = "ieee", "tf32"
    with float32_exact():
        assert precisions() == ["ieee", "ieee"]
    assert precisions() == ["ieee", "tf32"]
    cudnn.allow_tf32 = before[0]
    cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before[1]
    assert cudnn.allow_tf32 == before[0]
