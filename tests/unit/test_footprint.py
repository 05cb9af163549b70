"""The multiply-accumulates of architectures whose weights do not lie in torch's linear layers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from coppice.models import footprint
from tests.architectures import tiny


@pytest.mark.parametrize(
    ("title", "macs"),
    [
        # four layers (attention 4 x 32 x 32, MLP 2 x 32 x 128) and the head
        ("GPT-2", 4 * (4 * 32 * 32 + 2 * 32 * 128) + 96 * 32),
        # four layers (attention 2 x 32 x 32 + 2 x 16 x 32, router 4 x 32 is no matrix of a layer, 2 of 4 experts)
        ("Mixtral", 4 * (2 * 32 * 32 + 2 * 16 * 32 + 2 * 3 * 32 * 48) + 96 * 32),
    ],
)
def test_counts_the_weights_that_a_token_uses(title, macs):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny.configuration(title))
    assert footprint.measure(model)["linear_macs"] == macs
