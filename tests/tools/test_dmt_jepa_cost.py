"""benchmarks/dmt_jepa.py: what it counts as an addition, its models' sizes, its tables."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import dmt_jepa as benchmark  # noqa: E402

LEARNED, FREE = "DMT-JEPA, learned", "DMT-JEPA, parameter free"
METHODS = ("choose_neighbours", "pooled_targets", "pooled_context", "shared_with")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of what DMT-JEPA's model calls and I-JEPA's does not, as they are called."""
    from jepa_plugins.core import dmt_jepa
    from jepa_plugins.core.aggregation import AggregationHead

    found: set[str] = set()

    def watch(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def called(*args, **kwargs):
            found.add(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, called)

    for name in METHODS:
        watch(dmt_jepa, name)
    for name in ("targets", "context"):
        watch(AggregationHead, name)
    return found


def test_the_additions_are_all_that_a_step_has_beyond_ijepas(calls: set[str]) -> None:
    want = {
        "I-JEPA": set(),
        LEARNED: {"choose_neighbours", "shared_with", "targets", "context"},
        FREE: {"choose_neighbours", "shared_with", "pooled_targets", "pooled_context"},
    }
    for name, settings in benchmark.ARMS.items():
        arm = benchmark.Arm("quick", settings, 2, "cpu")
        for action in (arm.step, arm.addition):
            calls.clear()
            action()
            assert calls == want[name], name
        head = arm.model.context_head
        stepped = {id(p) for p in arm.optimizer.state}
        assert stepped == {id(p) for p in arm.model.parameters() if p.requires_grad}
        if head is not None:  # its part of the optimiser was an addition, too
            assert set(arm.head_optimizer.state) == set(head.parameters())


def test_steps_and_additions_leave_the_weights() -> None:
    arm = benchmark.Arm("quick", benchmark.ARMS[LEARNED], 2, "cpu")
    before = {name: value.clone() for name, value in arm.model.named_parameters()}
    arm.step()
    arm.addition()
    assert all(torch.allclose(value, before[name]) for name, value in arm.model.named_parameters())
    assert all(parameter.grad is None for parameter in arm.model.parameters()) and arm.context.grad is None
    assert arm.model.steps_done == 1


@pytest.mark.parametrize(
    ("size", "millions", "grid"), [("small", 22, 14), ("base", 86, 14), ("quick", 3, 10)]
)
@pytest.mark.parametrize("arm", benchmark.ARMS)
def test_the_shapes_are_the_papers(size: str, millions: int, grid: int, arm: str) -> None:
    with torch.device("meta"):
        model = benchmark.build(size, benchmark.ARMS[arm])
    assert model.encoder.grid == (grid, grid)
    assert round(sum(p.numel() for p in model.encoder.parameters()) / 1e6) == millions
    assert (model.context_head is not None) == (arm == LEARNED)


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(benchmark, "peak_memory_apart", lambda size, name, *rest: 2**30 + len(name) * 2**20)
    monkeypatch.setattr(
        sys, "argv", ["dmt_jepa.py", "--sizes", "quick", "--batch", "2", "--rounds", "1", "--device", "cpu"]
    )
    benchmark.main()
    head, _, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()
    ]
    assert [row[:2] for row in rows] == [["quick", name] for name in benchmark.ARMS]
    assert all(len(row) == len(head) for row in rows)
    at = {name: [float(row[head.index(name)].rstrip("%M")) for row in rows] for name in head[2:]}
    assert at["time ratio"][0] == at["peak ratio"][0] == 1 and at["added, ms"][1] > at["added, ms"][0] >= 0
    for step, added, share in zip(at["step, ms"], at["added, ms"], at["of step"], strict=True):
        assert share == pytest.approx(100 * added / step, abs=0.1)
    assert at["trained"][1] > at["trained"][0] == at["trained"][2] and min(at["peak GiB"]) >= 1


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    most = benchmark.peak_memory_apart("quick", LEARNED, 2, "cpu")
    arm = benchmark.Arm("quick", benchmark.ARMS[LEARNED], 1, "cpu")
    weights = sum(p.numel() * p.element_size() for p in arm.model.parameters())
    moments = 2 * sum(p.numel() * p.element_size() for p in arm.model.parameters() if p.requires_grad)
    assert weights + moments < most < 2**30


def test_what_drawing_masks_costs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dmt_jepa.py", "--masks", "--rounds", "1", "--device", "cpu"])
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(line.startswith("masks ") and " ms " in line for line in lines)
