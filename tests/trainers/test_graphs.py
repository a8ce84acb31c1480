"""CUDA graphs of the network in training steps of small patches. Without a GPU, a CPU is treated as one."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch._dynamo.eval_frame import DisableContext

from nnunet_conres.architectures import layout
from nnunet_conres.trainers import graphs, nnUNetTrainerMuon, nnUNetTrainerResidualMaps, nnUNetTrainerUNet3D
from nnunet_conres.trainers.base import PluginTrainer
from nnunet_conres.trainers.graphs import MOST_VOXELS, GraphedStepsTrainer, waits_for_python, with_graphs


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """Record the arguments of torch.compile, and compile nothing."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def note(model: Any, **options: Any) -> Any:
        calls.append((model, options))
        return OptimizedModule(model, DisableContext()) if isinstance(model, nn.Module) else model

    monkeypatch.setattr(torch, "compile", note)
    monkeypatch.setattr(graphs, "_DEVICES", {"cpu"})
    monkeypatch.setattr(PluginTrainer, "_do_i_compile", lambda _: True)
    return calls


class _InBuffer(torch.autograd.Function):
    """Identity, whose output is in the same memory in all steps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, memory: dict[Any, Tensor], key: Any) -> Tensor:
        return _into(memory, key, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None, None


def _into(memory: dict[Any, Tensor], key: Any, value: Tensor) -> Tensor:
    if key in memory:
        memory[key].data.copy_(value)
    else:
        memory[key] = value.detach().clone()
    return memory[key].data  # autograd doesn't see that it changes


class Overwriting(nn.Module):
    """A network whose outputs and gradients are overwritten in each step, as with CUDA graphs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.memory: dict[Any, Tensor] = {}
        self.n_calls = 0

    def forward(self, image: Tensor) -> list[Tensor]:
        if self.n_calls == 0:
            for parameter in self.network.parameters():
                parameter.register_post_accumulate_grad_hook(self._move_gradient)
        self.n_calls += 1
        return [_InBuffer.apply(output, self.memory, number) for number, output in enumerate(self.network(image))]

    def _move_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad = _into(self.memory, parameter, parameter.grad)

    def spoil(self) -> None:
        """Overwrite the memory of the last step, as a new step may do."""
        for value in self.memory.values():
            value.data.fill_(float("nan"))


@pytest.fixture
def overwriting(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> list[Overwriting]:
    made: list[Overwriting] = []

    def make(network: nn.Module) -> Overwriting:
        made.append(Overwriting(network))
        return made[-1]

    monkeypatch.setattr(graphs, "with_graphs", make)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: [one.spoil() for one in made])
    return made


def started(trainer: Any) -> Any:
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    return trainer


def same_steps(plain: Any, ours: Any, batches: list[Any]) -> None:
    """Check that both trainers take the same steps, with a validation step after the first."""
    for number, batch in enumerate(batches):
        found = [trainer.train_step(deepcopy(batch)) for trainer in (plain, ours)]
        if number == 0:
            with torch.no_grad():
                for trainer in (plain, ours):
                    trainer.on_validation_epoch_start()
                    found.append(trainer.validation_step(deepcopy(batch)))
                    trainer.network.train()
        for expected, value in zip(found[::2], found[1::2], strict=True):
            assert expected.keys() == value.keys()
            for name in expected.keys() & {"loss", "segmentation_loss", "residual_loss", "tp_hard"}:
                assert np.isfinite(expected[name]).all()
                np.testing.assert_allclose(value[name], expected[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("device", "batch_size", "patch_size", "waits"),
    [
        ("cuda", 2, (40, 56, 40), True),
        ("cuda", 9, (40, 56, 40), True),
        ("cuda", 2, (128, 128, 128), False),
        ("cuda", MOST_VOXELS // 64**3, np.array([64, 64, 64]), True),
        ("cuda", MOST_VOXELS // 64**3 + 1, [64, 64, 64], False),
        ("cpu", 2, (40, 56, 40), False),
    ],
)
def test_where_a_gpu_waits(device: str, batch_size: int, patch_size: Any, waits: bool) -> None:
    assert waits_for_python(torch.device(device), batch_size, patch_size) == waits


class TestWhichNetworkIsCompiledHow:
    def graphed(self, make_trainer: Callable[..., Any]) -> Any:
        trainer = make_trainer(nnUNetTrainerMuon)
        trainer.initialize()
        return trainer._graphed_network

    def test_twice_with_the_same_weights(self, make_trainer: Callable[..., Any], compiled: list[Any]) -> None:
        trainer = make_trainer(nnUNetTrainerMuon)
        trainer.initialize()
        options = [options for model, options in compiled if model is trainer.network._orig_mod]
        assert options == [{}, {"mode": "reduce-overhead", "dynamic": False}]
        assert trainer._graphed_network._orig_mod is trainer.network._orig_mod

    def test_switched_off(
        self, make_trainer: Callable[..., Any], compiled: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("nnUNet_conres_fast_step", "0")
        assert self.graphed(make_trainer) is None

    def test_not_compiled(
        self, make_trainer: Callable[..., Any], compiled: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(PluginTrainer, "_do_i_compile", lambda _: False)
        assert self.graphed(make_trainer) is None

    def test_large_batches(
        self, make_trainer: Callable[..., Any], compiled: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(graphs, "MOST_VOXELS", 100)
        assert self.graphed(make_trainer) is None

    def test_several_gpus(
        self, make_trainer: Callable[..., Any], compiled: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trainer = make_trainer(nnUNetTrainerMuon)
        trainer.is_ddp = True
        monkeypatch.setattr("nnunet_conres.trainers.nonfinite.nnUNetTrainer.initialize", lambda self: None)
        trainer.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
        GraphedStepsTrainer.initialize(trainer)
        assert trainer._graphed_network is None


@pytest.mark.parametrize("trainer_class", [nnUNetTrainerResidualMaps, nnUNetTrainerUNet3D])
def test_steps_are_right_where_outputs_are_overwritten(
    make_trainer: Callable[..., Any], overwriting: list[Overwriting], trainer_class: type
) -> None:
    plain, ours = (started(make_trainer(trainer_class)) for _ in range(2))
    plain._graphed_network = None
    ours._unwrapped_network().load_state_dict(plain._unwrapped_network().state_dict())
    same_steps(plain, ours, [next(plain.dataloader_train) for _ in range(3)])
    assert [one.n_calls for one in overwriting] == [0, 3]  # validation is compiled as in nnU-Net
    for name, value in ours._unwrapped_network().state_dict().items():
        torch.testing.assert_close(value, plain._unwrapped_network().state_dict()[name], rtol=1e-3, atol=1e-4)
    assert isinstance(ours.network, OptimizedModule)  # the network that prediction uses


class TestFailure:
    @pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError, AssertionError])
    def test_step_is_taken_without_graphs(
        self,
        make_trainer: Callable[..., Any],
        overwriting: list[Overwriting],
        monkeypatch: pytest.MonkeyPatch,
        kind: type[Exception],
    ) -> None:
        plain, ours = (started(make_trainer(nnUNetTrainerMuon)) for _ in range(2))
        plain._graphed_network = None
        ours._unwrapped_network().load_state_dict(plain._unwrapped_network().state_dict())

        def fail(*_: Any) -> Any:
            raise kind("operation not permitted when stream is capturing\nand more")

        n_calls: list[int] = []
        overwriting[1].register_forward_hook(lambda *_: n_calls.append(1) if len(n_calls) == 0 else fail())
        messages: list[str] = []
        monkeypatch.setattr(ours, "print_to_log_file", lambda *args, **_: messages.append(str(args[0])))
        same_steps(plain, ours, [next(plain.dataloader_train) for _ in range(4)])
        assert messages == [
            "WARNING: training continues without CUDA graphs of the network: operation not permitted when stream is "
            "capturing"
        ]
        assert overwriting[1].n_calls == 2

    def test_of_a_step_that_was_taken_is_an_error(
        self, make_trainer: Callable[..., Any], overwriting: list[Overwriting]
    ) -> None:
        """Otherwise the step would be taken twice."""
        trainer = started(make_trainer(nnUNetTrainerMuon))

        def fail(*_: Any) -> Any:
            raise RuntimeError("device-side assert")

        trainer.optimizer.register_step_post_hook(fail)
        compiled = trainer.network
        with pytest.raises(RuntimeError, match="device-side assert"):
            trainer.train_step(next(trainer.dataloader_train))
        assert trainer.network is compiled
        assert overwriting[0].n_calls == 1


class Derived(nnUNetTrainerMuon):
    """Typical changes of users: a network that nnU-Net builds, another optimiser, another step."""

    build_network_architecture = staticmethod(nnUNetTrainer.build_network_architecture)
    configure_optimizers = nnUNetTrainer.configure_optimizers

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        return super().train_step(batch) | {"cases": len(batch["data"])}


def test_trainers_that_users_derive(
    make_trainer: Callable[..., Any], overwriting: list[Overwriting], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_DEVICES", {"cpu"})
    trainer = started(make_trainer(Derived))
    before = [parameter.clone() for parameter in trainer.network.parameters()]
    batch = next(trainer.dataloader_train)
    outputs = trainer.train_step(batch)
    assert (outputs["cases"], outputs["skipped"], overwriting[0].n_calls) == (len(batch["data"]), 0, 1)
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    assert not all(torch.equal(one, other) for one, other in zip(trainer.network.parameters(), before, strict=True))
    # a contiguous network would have to convert channels-last weights
    assert all(parameter.is_contiguous() for parameter in trainer.network.parameters())


def test_real_compiler_takes_the_options() -> None:
    """Without code generation. Graphs need a GPU."""
    torch.compiler.reset()
    network = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU())
    image = torch.randn(1, 1, 5, 5, 5)
    torch.testing.assert_close(with_graphs(network, backend="aot_eager", fullgraph=True)(image), network(image))


@pytest.mark.gpu
@pytest.mark.parametrize("trainer_class", [nnUNetTrainerMuon, nnUNetTrainerResidualMaps, nnUNetTrainerUNet3D])
def test_on_a_gpu(make_trainer: Callable[..., Any], trainer_class: type) -> None:
    from torch._dynamo.utils import counters
    from torch._inductor.cudagraph_trees import get_manager

    torch.compiler.reset()
    counters.clear()
    plain, ours = (started(make_trainer(trainer_class, device="cuda")) for _ in range(2))
    assert plain._graphed_network is not None
    plain._graphed_network = None
    ours._unwrapped_network().load_state_dict(plain._unwrapped_network().state_dict())
    same_steps(plain, ours, [next(plain.dataloader_train) for _ in range(6)])
    assert ours._graphed_network is not None
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert next(get_manager(torch.cuda.current_device()).graph_counter) >= 2  # forward and backward
