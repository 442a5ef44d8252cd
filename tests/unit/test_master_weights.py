"""P19: what a training in 16 bits has in float32 beside its model survives a checkpoint, which stays fairseq's own."""

import io
from types import SimpleNamespace

import pytest
import torch
from fairseq import utils
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import ModuleProxyWrapper
from fairseq.models import BaseFairseqModel
from fairseq.optim.adam import FairseqAdamConfig
from fairseq.optim.fp16_optimizer import FP16Optimizer, MemoryEfficientFP16Optimizer
from fairseq.optim.lr_scheduler.fixed_schedule import FixedLRScheduleConfig
from fairseq.trainer import Trainer
from omegaconf import OmegaConf

import intra_distillation_fairseq  # noqa: F401  puts the mends in place

pytestmark = pytest.mark.filterwarnings("ignore:.*GradScaler")  # that of --amp finds no GPU

WITH_MASTERS = {
    "bf16": {"bf16": True},
    "fp16": {"fp16": True, "fp16_no_flatten_grads": True, "fp16_scale_window": 2},
    "fp16, flat": {"fp16": True, "fp16_scale_window": 2},
}
WITHOUT = {
    "float32": {},
    "amp": {"amp": True},
    "memory-efficient bf16": {"bf16": True, "memory_efficient_bf16": True},
    "memory-efficient fp16": {"fp16": True, "memory_efficient_fp16": True, "fp16_scale_window": 2},
}
ITERATOR = {"train_iterator": {"version": 2, "epoch": 1, "iterations_in_epoch": 3}}
TIED = ("embed.weight", "project.weight")


class Model(BaseFairseqModel):
    """Tied embeddings, a frozen parameter and a buffer."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(50, 8)
        self.hidden = torch.nn.Linear(8, 8)
        self.project = torch.nn.Linear(8, 50, bias=False)
        self.project.weight = self.embed.weight
        self.frozen = torch.nn.Parameter(torch.rand(8), requires_grad=False)
        self.register_buffer("positions", torch.rand(8))

    def forward(self, tokens):
        return self.project(torch.tanh(self.hidden(self.embed(tokens) + self.positions)) * self.frozen)


class Criterion(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.tensor([1.3]))


class Wrapper(torch.nn.Module):
    """As DistributedDataParallel has its model."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module


@pytest.fixture(autouse=True)
def index_of_the_cpu(monkeypatch):
    """fairseq looks the flat weights up by the index of a CUDA device; None is that of the CPU."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)


def make_trainer(**common) -> Trainer:
    cfg = OmegaConf.structured(FairseqConfig)
    cfg.common.update(cpu=True, **common)
    cfg.model, cfg.task = {"_name": None}, {}
    cfg.optimization.lr = [0.01]
    cfg.optimizer = FairseqAdamConfig(_name="adam", weight_decay=0.1)
    cfg.lr_scheduler = FixedLRScheduleConfig(_name="fixed")
    torch.manual_seed(1)
    trainer = Trainer(cfg, SimpleNamespace(state_dict=dict), Model(), Criterion())
    trainer._gathered_optim_state = None  # as fairseq has it before each checkpoint
    return trainer


def train(trainer: Trainer, updates: range) -> None:
    for update in updates:
        tokens = torch.randint(50, (16,), generator=torch.Generator().manual_seed(update))
        trainer.optimizer.zero_grad()
        scores = trainer.get_model()(tokens).float() * trainer.get_criterion().temperature.float()
        loss = torch.nn.functional.cross_entropy(scores, tokens.flip(0))
        if trainer.cfg.common.amp:
            loss.backward()  # the scaler of --amp needs a GPU
            trainer.optimizer.fp32_optimizer.step()
        else:
            trainer.optimizer.backward(loss)
            trainer.optimizer.clip_grad_norm(0.0)
            trainer.optimizer.step()
        trainer.set_num_updates(update + 1)


def trained_and_saved(path, **common) -> Trainer:
    trainer = make_trainer(**common)
    train(trainer, range(3))
    trainer.save_checkpoint(str(path), ITERATOR)
    return trainer


def resumed(path, load=Trainer.load_checkpoint, reset_optimizer=False, **common) -> Trainer:
    trainer = make_trainer(**common)
    with torch.no_grad():
        for parameter in trainer.get_model().parameters():
            parameter.zero_()
    load(trainer, str(path), reset_optimizer)
    return trainer


def saved(path) -> dict:
    return torch.load(path, weights_only=True)


def masters(trainer: Trainer) -> torch.Tensor:
    """In one piece."""
    weights = trainer.optimizer.fp32_params
    weights = weights.values() if trainer.optimizer.has_flat_params else weights
    return torch.cat([w.detach().flatten() for w in weights])


def parameters(trainer: Trainer) -> torch.Tensor:
    """Those that are trained, in one piece and in the order of the masters."""
    both = (trainer.get_model(), trainer.get_criterion())
    return torch.cat([p.detach().flatten() for module in both for p in module.parameters() if p.requires_grad])


def assert_same_state(one: Trainer, other: Trainer) -> None:
    torch.testing.assert_close(one.state_dict()["model"], other.state_dict()["model"], rtol=0, atol=0)
    torch.testing.assert_close(one.optimizer.state_dict(), other.optimizer.state_dict(), rtol=0, atol=0)
    assert torch.equal(parameters(one), parameters(other))


@pytest.mark.parametrize("precision", [*WITH_MASTERS, *WITHOUT])
def test_a_resumed_training_equals_one_that_never_stopped(tmp_path, precision):
    """Of a model, tied or not, and of a criterion that has parameters."""
    settings = {**WITH_MASTERS, **WITHOUT}[precision]
    whole = trained_and_saved(tmp_path / "3.pt", **settings)
    again = resumed(tmp_path / "3.pt", **settings)
    assert_same_state(whole, again)
    if precision in WITH_MASTERS:
        assert isinstance(whole.optimizer, FP16Optimizer)
        assert whole.optimizer.has_flat_params == ("flat" in precision)
        assert torch.equal(masters(again), masters(whole))
        assert not torch.equal(masters(again), parameters(again).float())
    for trainer in (whole, again):
        train(trainer, range(3, 9))
    assert_same_state(whole, again)


@pytest.mark.parametrize("precision", WITH_MASTERS)
def test_the_file_has_the_masters_and_is_an_ordinary_checkpoint(tmp_path, precision):
    trainer = trained_and_saved(tmp_path / "3.pt", **WITH_MASTERS[precision])
    state, plain = saved(tmp_path / "3.pt"), utils.move_to_cpu(Trainer.state_dict.__wrapped__(trainer))
    assert state.keys() == plain.keys() and state["model"].keys() == plain["model"].keys()
    trained = ("embed.weight", "hidden.weight", "hidden.bias")
    written = torch.cat([*(state["model"][name].flatten() for name in trained), state["criterion"]["temperature"]])
    assert torch.equal(written, masters(trainer))
    for name, value in plain["model"].items():
        assert state["model"][name].dtype == torch.float32
        rounded = state["model"][name].to(trainer.get_model().embed.weight.dtype).float()
        assert torch.equal(rounded, value), name  # the model that fairseq would have written
    assert torch.equal(*(state["model"][name] for name in TIED))
    file = io.BytesIO()
    torch.save({**plain, "extra_state": {**plain["extra_state"], **ITERATOR}}, file)
    assert (tmp_path / "3.pt").stat().st_size <= len(file.getvalue()) + 1024  # counts of the loss scale

    # fairseq without the mend goes on from it as from its own.
    again = resumed(tmp_path / "3.pt", load=Trainer.load_checkpoint.__wrapped__, **WITH_MASTERS[precision])
    assert torch.equal(parameters(again), parameters(trainer))
    assert torch.equal(masters(again), parameters(trainer).float())


@pytest.mark.parametrize("precision", WITH_MASTERS)
def test_a_checkpoint_without_masters_loads_as_before(tmp_path, monkeypatch, precision):
    with monkeypatch.context() as without:
        for owner, name in ((Trainer, "state_dict"), (FP16Optimizer, "state_dict")):
            without.setattr(owner, name, getattr(owner, name).__wrapped__)
        trainer = trained_and_saved(tmp_path / "3.pt", **WITH_MASTERS[precision])
    assert "loss_scale_counts" not in saved(tmp_path / "3.pt")["last_optimizer_state"]
    again = resumed(tmp_path / "3.pt", **WITH_MASTERS[precision])
    assert torch.equal(parameters(again), parameters(trainer))
    assert torch.equal(masters(again), parameters(trainer).float())


@pytest.mark.parametrize("precision", WITHOUT)
def test_where_there_are_no_masters_the_file_is_fairseqs(tmp_path, precision):
    trainer = trained_and_saved(tmp_path / "3.pt", **WITHOUT[precision])
    state, plain = saved(tmp_path / "3.pt"), utils.move_to_cpu(Trainer.state_dict.__wrapped__(trainer))
    for part in ("model", "criterion"):
        torch.testing.assert_close(state[part], plain[part], rtol=0, atol=0)


@pytest.mark.parametrize("precision", WITH_MASTERS)
def test_a_reset_optimizer_starts_from_the_model_as_before(tmp_path, precision):
    trainer = trained_and_saved(tmp_path / "3.pt", **WITH_MASTERS[precision])
    again = resumed(tmp_path / "3.pt", reset_optimizer=True, **WITH_MASTERS[precision])
    assert torch.equal(parameters(again), parameters(trainer))
    assert torch.equal(masters(again), parameters(trainer).float())


def test_a_parameter_that_its_master_does_not_round_to_is_written_itself(tmp_path):
    """Frozen on the way, its master decays without it; and what a module changes while it is loaded stays so."""
    trainer = make_trainer(bf16=True)
    train(trainer, range(3))
    trainer.get_model().hidden.bias.requires_grad = False
    frozen = trainer.get_model().hidden.bias.detach().float()
    train(trainer, range(3, 9))
    trainer.save_checkpoint(str(tmp_path / "9.pt"), ITERATOR)
    assert torch.equal(saved(tmp_path / "9.pt")["model"]["hidden.bias"], frozen)

    def fill(module: torch.nn.Linear, _) -> None:
        module.bias.data.fill_(2)

    other = make_trainer(bf16=True)
    other.get_model().hidden.register_load_state_dict_post_hook(fill)
    other.load_checkpoint(str(tmp_path / "9.pt"))
    assert other.state_dict()["model"]["hidden.bias"].eq(2).all()
    assert masters(other)[50 * 8 + 8 * 8 :][:8].eq(2).all()


def test_the_wrapper_of_several_processes_is_seen_through(tmp_path):
    """Names in the file are the model's own."""
    trainer = make_trainer(bf16=True)
    trainer._wrapped_model = ModuleProxyWrapper(Wrapper(trainer.get_model()))
    train(trainer, range(3))
    trainer.save_checkpoint(str(tmp_path / "3.pt"), ITERATOR)
    again = make_trainer(bf16=True)
    again._wrapped_model = ModuleProxyWrapper(Wrapper(again.get_model()))
    again.load_checkpoint(str(tmp_path / "3.pt"))
    assert torch.equal(masters(again), masters(trainer))
    assert not torch.equal(masters(again), parameters(again).float())


def test_the_average_of_store_ema_is_another_model(tmp_path):
    """fairseq makes it, a copy of the model, while it loads a checkpoint."""
    whole, again = make_trainer(bf16=True), make_trainer(bf16=True)
    for trainer in (whole, again):
        trainer.cfg.ema.store_ema = True
    for update in range(3):
        assert whole.ema.get_model() is not whole.get_model()  # made now
        train(whole, range(update, update + 1))
        whole.ema.step(whole.get_model(), update)
    whole.save_checkpoint(str(tmp_path / "3.pt"), ITERATOR)
    again.load_checkpoint(str(tmp_path / "3.pt"))
    assert_same_state(whole, again)
    averages = [trainer.ema.get_model().state_dict() for trainer in (whole, again)]
    torch.testing.assert_close(*averages, rtol=0, atol=0)
    assert not torch.equal(averages[0]["hidden.weight"], whole.get_model().hidden.weight)


@pytest.mark.parametrize("kind", [FP16Optimizer, MemoryEfficientFP16Optimizer])
def test_the_loss_scale_grows_at_the_same_updates(kind):
    """Whatever overflowed before; and fairseq without the mend leaves the counts alone."""
    settings = {"fp16": True, "fp16_no_flatten_grads": True, "fp16_scale_window": 3}
    settings["memory_efficient_fp16"] = kind is MemoryEfficientFP16Optimizer

    def scales(optimizer, updates: range) -> list[float]:
        seen = []
        for update in updates:
            try:
                optimizer.scaler.check_overflow(float("inf") if update in (1, 8) else 1.0)
                optimizer.scaler.update()
            except OverflowError:
                pass
            seen.append(optimizer.scaler.loss_scale)
        return seen

    one, other, plain = (make_trainer(**settings).optimizer for _ in range(3))
    assert type(one) is kind
    scales(one, range(6))
    state = one.state_dict()
    other.load_state_dict(state)
    kind.load_state_dict.__wrapped__(plain, state)
    assert other.scaler.__dict__ == one.scaler.__dict__
    expected = scales(one, range(6, 14))
    assert scales(other, range(6, 14)) == expected
    assert scales(plain, range(6, 14)) != expected
