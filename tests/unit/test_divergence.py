"""The fused divergence between a student and a teacher: against dense formulas in float64."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from coppice.models import divergence, output_head
from coppice.models.divergence import Mixture, Predictions

TOKENS, WIDTH, VOCABULARY = 37, 16, 101
HEADS = (16, 24)  # the widths of both models, which transposed heads have as their rows


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Let a chunk have 5 rows, so that several chunks and a last short one occur."""
    monkeypatch.setattr(output_head, "TRAINING_CHUNK_BYTES", 4 * VOCABULARY * 10)


def problem(dtype=torch.float32, teacher_width=24, bias=False):
    """Return (student's states, its head, teacher's states, its head, targets)."""
    torch.manual_seed(3)
    student = torch.nn.Linear(WIDTH, VOCABULARY, bias=bias).to(dtype)
    teacher = torch.nn.Linear(teacher_width, VOCABULARY).to(dtype)
    states = torch.randn(TOKENS, WIDTH).mul(2).to(dtype).requires_grad_()
    return states, student, torch.randn(TOKENS, teacher_width).mul(2).to(dtype), teacher, torch.randint(101, (TOKENS,))


def dense(student, teacher, targets, mixture):
    """Return the loss, position by position in float64, as TRL's GKD trainer and the cross-entropy are defined."""
    total = torch.zeros((), dtype=torch.float64)
    for ours, theirs, target in zip(student.double(), teacher.double(), targets, strict=True):
        s = torch.log_softmax(ours / mixture.temperature, 0)
        t = torch.log_softmax(theirs / mixture.temperature, 0)
        if mixture.beta == 0:
            found = (t.exp() * (t - s)).sum()
        elif mixture.beta == 1:
            found = (s.exp() * (s - t)).sum()
        else:  # TRL: the mixture's logarithm, and kl_div(mixture, teacher) and kl_div(mixture, student)
            beta = torch.tensor(mixture.beta, dtype=torch.float64)
            m = torch.logsumexp(torch.stack([s + torch.log1p(-beta), t + torch.log(beta)]), 0)
            kl_div = torch.nn.functional.kl_div
            found = beta * kl_div(m, t, reduction="sum", log_target=True)
            found = found + (1 - beta) * kl_div(m, s, reduction="sum", log_target=True)
        total = total + mixture.kl * mixture.temperature**2 * found
        total = total - mixture.ce * torch.log_softmax(ours, 0)[target]
    return total


def dense_of(states, head, others, teacher, targets, mixture):
    """Return (loss, gradients of states, weight and bias) of the dense loss on float64 copies."""
    x, w = states.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    b = None if head.bias is None else head.bias.detach().double().requires_grad_()
    theirs = torch.nn.functional.linear(others.double(), teacher.weight.double(), teacher.bias.double())
    loss = dense(torch.nn.functional.linear(x, w, b), theirs.detach(), targets, mixture)
    return loss.detach(), torch.autograd.grad(loss, [tensor for tensor in (x, w, b) if tensor is not None])


MIXTURES = [
    Mixture(),
    Mixture(ce=0.5, kl=0.5),
    Mixture(ce=0.3, kl=0.7, temperature=2.5),
    Mixture(beta=1),
    Mixture(ce=0.2, kl=2, temperature=0.5, beta=1),
    Mixture(beta=0.5),
    Mixture(beta=0.1),
    Mixture(ce=1, kl=0.5, temperature=2, beta=0.9),
]


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_loss_and_all_gradients_equal_a_dense_loop_in_float64(mixture):
    states, head, others, teacher, targets = problem(bias=True)
    loss = divergence.summed_loss(Predictions(states, head), Predictions(others, teacher), targets, mixture)
    # as in training: the sum is divided by the number of targets before the backward pass
    found = torch.autograd.grad(loss / TOKENS, [states, head.weight, head.bias])
    expected, gradients = dense_of(states, head, others, teacher, targets, mixture)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, wanted in zip(found, gradients, strict=True):
        assert (ours.double() * TOKENS - wanted).norm() <= 1e-4 * wanted.norm()
    assert teacher.weight.grad is None and not any(p.grad is not None for p in teacher.parameters())


def test_a_frozen_head_gets_no_gradient_and_the_states_get_the_same():
    states, head, others, teacher, targets = problem()
    arguments = (Predictions(others, teacher), targets, Mixture(ce=0.5, kl=0.5))
    (wanted,) = torch.autograd.grad(divergence.summed_loss(Predictions(states, head), *arguments), [states])
    head.requires_grad_(False)
    divergence.summed_loss(Predictions(states, head), *arguments).backward()
    assert states.grad.equal(wanted) and head.weight.grad is None


def test_a_tied_head_gets_the_gradient_of_both_its_uses():
    _, head, others, teacher, targets = problem()
    ids = torch.arange(TOKENS)
    tied = Predictions(head.weight[ids] * 3, head)
    divergence.summed_loss(tied, Predictions(others, teacher), targets, Mixture()).backward()
    w = head.weight.detach().double().requires_grad_()
    theirs = torch.nn.functional.linear(others.double(), teacher.weight.double(), teacher.bias.double()).detach()
    dense((w[ids] * 3) @ w.T, theirs, targets, Mixture()).backward()
    assert (head.weight.grad - w.grad).norm() <= 1e-4 * w.grad.norm()


@pytest.mark.parametrize("mixture", MIXTURES[2::3], ids=str)
def test_logits_of_models_without_a_head_give_the_same(mixture):
    states, head, others, teacher, targets = problem()
    wanted = divergence.summed_loss(Predictions(states, head), Predictions(others, teacher), targets, mixture)
    (gradient,) = torch.autograd.grad(wanted, [states])
    loss = divergence.summed_loss(Predictions(head(states), None), Predictions(teacher(others), None), targets, mixture)
    (found,) = torch.autograd.grad(loss, [states])
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert (found - gradient).norm() <= 1e-5 * gradient.norm()


class Scaled(torch.nn.Linear):
    """A head that is more than its weight, as one with an adapter is."""

    def forward(self, x):
        """Return scaled logits."""
        return 1.5 * super().forward(x)


def test_a_head_that_is_more_than_its_weight_runs_as_a_module():
    states, plain, others, teacher, targets = problem()
    head = Scaled(WIDTH, VOCABULARY, bias=False)
    head.load_state_dict(plain.state_dict())
    mixture = Mixture(ce=0.5, kl=0.5, beta=0.5)
    loss = divergence.summed_loss(Predictions(states, head), Predictions(others, teacher), targets, mixture)
    found = torch.autograd.grad(loss, [states, head.weight])
    plain.weight.data *= 1.5
    expected, (of_states, of_weight) = dense_of(states, plain, others, teacher, targets, mixture)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (found[0] - of_states).norm() <= 1e-4 * of_states.norm()
    assert (found[1] - 1.5 * of_weight).norm() <= 1e-4 * of_weight.norm()


def test_bfloat16_is_as_exact_as_its_logits():
    """bfloat16 has 8 bits, so logits are wrong by up to 0.4 %; the sums over them add no further error."""
    states, head, others, teacher, targets = problem(torch.bfloat16)
    mixture = Mixture(ce=0.5, kl=0.5)
    loss = divergence.summed_loss(Predictions(states, head), Predictions(others, teacher), targets, mixture)
    found = torch.autograd.grad(loss, [states, head.weight])
    exact = dense(head(states), teacher(others), targets, mixture)  # of the same rounded logits
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    expected, gradients = dense_of(states, head, others, teacher, targets, mixture)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    for ours, wanted in zip(found, gradients, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - wanted).norm() <= 2e-2 * wanted.norm()


class Sizes(TorchDispatchMode):
    """Finds the largest tensor that any operation returns, and the most logits that are in memory together."""

    def __init__(self):
        """Begin with nothing in memory."""
        super().__init__()
        self.largest = self.together = 0
        self.alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation and look at its results."""
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                if tensor.shape[1:] == (VOCABULARY,) and len(tensor) not in HEADS:
                    reference = StorageWeakRef(tensor.untyped_storage())
                    self.alive[reference.cdata] = reference, tensor.numel()
        self.alive = {key: one for key, one in self.alive.items() if not one[0].expired()}
        self.together = max(self.together, sum(size for _, size in self.alive.values()))
        return found


@pytest.mark.parametrize("beta", [0, 0.5, 1])
@pytest.mark.parametrize("plain", [True, False])
def test_no_tensor_has_the_logits_of_all_tokens(beta, plain):
    _, head, _, teacher, _ = problem()
    head = head if plain else Scaled(WIDTH, VOCABULARY, bias=False)
    states, others = torch.randn(400, WIDTH, requires_grad=True), torch.randn(400, 24)
    targets, mixture = torch.randint(VOCABULARY, (400,)), Mixture(0.5, 0.5, 2.0, beta)
    with Sizes() as sizes:
        divergence.summed_loss(Predictions(states, head), Predictions(others, teacher), targets, mixture).backward()
    chunk = 5 * VOCABULARY
    assert sizes.largest <= max(others.numel(), chunk)
    assert chunk < sizes.together <= 9 * chunk  # of 80 chunks
