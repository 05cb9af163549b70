"""Log-likelihoods of a bfloat16 model are as exact as the model: the softmax must not round them again.

The truth is a float64 loop over the same weights.
"""

import copy
import functools
import random

import pytest
import tiny_architectures as tiny
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from coppice.stages.evaluate import zero_shot


def requests(items=20):
    rng = random.Random(0)

    def words(count):
        return " ".join(f"w{rng.randrange(3, 128)}" for _ in range(count))

    contexts = [words(rng.randint(5, 40)) for _ in range(items)]
    return [
        Instance("loglikelihood", {}, (one, f" {words(10)}"), i) for i, one in enumerate(contexts) for _ in range(2)
    ]


def truth(model, tokenizer, asked):
    """Return the float64 log-likelihoods of requests under a model's own weights."""
    exact, found = copy.deepcopy(model).double(), []
    with torch.inference_mode():
        for context, ending in (request.args for request in asked):
            ids = tokenizer.encode(context + ending)
            first = len(tokenizer.encode(context))
            scores = exact(torch.tensor([ids])).logits[0].log_softmax(-1)
            found.append(sum(scores[place - 1, ids[place]].item() for place in range(first, len(ids))))
    return found


def errors(model, tokenizer):
    """Return scorer -> root mean square error of its log-likelihoods, in nats."""
    asked = requests()
    expected = truth(model, tokenizer, asked)
    language_model = functools.partial(zero_shot.language_model, model, tokenizer, batch_size=8)
    scorers = {
        "lm-eval's default": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
        "engine: lm-eval": language_model("lm-eval"),
        "engine: prefix-tree": language_model("prefix-tree"),
    }
    found = {}
    for name, lm in scorers.items():
        scores = [value for value, _ in lm.loglikelihood(asked, disable_tqdm=True)]
        found[name] = torch.dist(torch.tensor(scores), torch.tensor(expected)).item() / len(asked) ** 0.5
    return found


@pytest.mark.parametrize("name", ["llama", "gpt_neo"])
def test_both_engines_take_the_softmax_in_float32(tiny_tokenizer, name):
    """Also if the prefix tree leaves the scoring to lm-eval's backend, as for GPT-Neo."""
    model = copy.deepcopy(tiny.build(name)).bfloat16()
    with torch.no_grad():  # to the size of usual weights: larger ones make the model's own rounding the larger part
        for weight in (parameter for parameter in model.parameters() if parameter.dim() > 1):
            weight.mul_(0.1)
    default, *ours = errors(model, tiny_tokenizer).values()
    assert max(ours) < 0.5 * default
