"""bf16 autocast against float32: what is computed in which format, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunetune import run_pipeline
from prunetune.engine.precision import AUTO, Precision
from prunetune.errors import ConfigError
from prunetune.store import Store

CPU = torch.device("cpu")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def images() -> Tensor:
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("precision", [AUTO, Precision("fp32")])
def test_on_a_cpu_the_model_is_called_as_it_is_unless_bf16_is_asked_for(precision: Precision) -> None:
    model = network().eval()
    assert torch.equal(precision.forward(model, CPU)(images()), model(images()))


def test_bf16_rounds_inside_and_keeps_logits_and_gradients_in_float32() -> None:
    model, x = network(), images()
    seen: list[torch.dtype] = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    logits = Precision("bf16").forward(model, CPU)(x)
    logits.square().sum().backward()
    assert seen == [torch.bfloat16]
    assert logits.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    exact = network()(x)
    torch.testing.assert_close(logits, exact, atol=0.05, rtol=0.05)
    assert not torch.equal(logits, exact)


def test_a_weight_that_changed_between_two_passes_is_cast_anew() -> None:
    model = network().eval()
    forward = Precision("bf16").forward(model, CPU)
    with torch.no_grad():
        first = forward(images())
        model[4].weight.zero_()
        model[4].bias.zero_()
        second = forward(images())
    assert first.any()
    assert not second.any()


def test_the_backends_are_left_alone_on_a_cpu_and_restored_after_a_gpu() -> None:
    def flags() -> tuple[bool, bool, bool]:
        cudnn = torch.backends.cudnn
        return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark

    before = flags()
    with Precision("bf16").backends(CPU):
        assert flags() == before
    for precision, tf32 in ((AUTO, True), (Precision("fp32"), False), (Precision("bf16"), True)):
        with precision.backends(torch.device("cuda")):  # sets flags only
            assert flags() == (tf32, tf32, True)
        assert flags() == before
    with pytest.raises(KeyError), Precision("fp32").backends(torch.device("cuda")):
        raise KeyError
    assert flags() == before


def test_on_a_cpu_denormal_floats_are_zero_within_and_only_there() -> None:
    def is_flushed() -> bool:
        return not torch.full((), 1e-39).mul(0.5)

    torch.set_flush_denormal(False)
    with AUTO.backends(CPU):
        assert is_flushed()
        with AUTO.backends(CPU):
            assert is_flushed()
        assert is_flushed()
    assert not is_flushed()
    with pytest.raises(KeyError), AUTO.backends(CPU):
        raise KeyError
    assert not is_flushed()


def test_a_bf16_run_learns_and_its_stages_are_not_those_of_fp32(tiny: dict[str, Any], tmp_path: Any) -> None:
    store = Store(str(tmp_path))
    tiny["seed"], tiny["post_pruning"] = 1, {"epochs": 12, "optimizer": {"name": "adam", "lr": 1e-2}}
    results = {
        name: run_pipeline({**tiny, "precision": name}, store=store, device="cpu")
        for name in ("auto", "fp32", "bf16")
    }
    assert [result.epochs_reused for result in results.values()] == [0, 0, 0]
    assert results["auto"].test_accuracy == results["fp32"].test_accuracy
    bf16 = results["bf16"]
    assert bf16.val_accuracy is not None
    assert bf16.val_accuracy > 0.4
    assert all(t.dtype == torch.float32 for t in bf16.state.values() if t.is_floating_point())
    assert any(not torch.equal(bf16.state[name], t) for name, t in results["fp32"].state.items())
    for name, mask in bf16.masks.items():
        assert not bf16.state[name][~mask].any()
    again = run_pipeline({**tiny, "precision": "bf16"}, store=Store(str(tmp_path / "other")), device="cpu")
    assert all(torch.equal(bf16.state[name], tensor) for name, tensor in again.state.items())


def test_the_precision_is_not_searched(tiny: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="precision"):
        run_pipeline({**tiny, "precision": "fp16"})
