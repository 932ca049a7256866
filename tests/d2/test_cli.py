"""Errors of the command-line tools: one sentence, whatever raised them."""

import pytest

pytest.importorskip("detectron2")

from jepa_plugins.core.cli import one_sentence, sentence_of  # noqa: E402
from jepa_plugins.core.images import ImageError  # noqa: E402


@pytest.mark.parametrize(
    "error, sentence",
    [
        (ValueError("a wrong value"), "a wrong value"),
        (KeyError("SOLVER.X is no key"), "SOLVER.X is no key"),
        (
            ImageError(
                "Caught ImageError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                '  File "x.py", line 1, in y\n'
                "jepa_plugins.core.images.ImageError: Image file 'a: b.jpg' is damaged.\n"
            ),
            "Image file 'a: b.jpg' is damaged.",
        ),
    ],
)
def test_sentences(error, sentence):
    assert sentence_of(error) == sentence


def test_known_errors_end_the_program_and_others_show_where_they_arose(monkeypatch):
    monkeypatch.delenv("JEPA_TRACEBACK", raising=False)

    @one_sentence
    def fails(error):
        raise error

    with pytest.raises(SystemExit, match="^error: a wrong value$"):
        fails(ValueError("a wrong value"))
    with pytest.raises(ZeroDivisionError):
        fails(ZeroDivisionError())
    monkeypatch.setenv("JEPA_TRACEBACK", "1")
    with pytest.raises(ValueError):
        fails(ValueError("a wrong value"))


def test_evaluation_waits_for_no_other_process(monkeypatch):
    """Processes may hold different numbers of held-out batches, so evaluation must not exchange counts."""
    import torch

    from jepa_plugins.core import mask_jepa
    from jepa_plugins.core.settings import MaskJEPASettings

    def exchanged(*_):
        raise AssertionError("counts were exchanged")

    monkeypatch.setattr(mask_jepa, "mean_count", exchanged)
    head = mask_jepa.MaskJEPAHead(
        MaskJEPASettings(recon_weight=0.0),
        feature_dim=8,
        mask_dim=8,
        hidden_dim=8,
        heads=2,
        feedforward=8,
    )
    arguments = (
        torch.zeros(1, 8, 4, 4),
        torch.randn(1, 3, 4, 4),
        torch.zeros(1, 3, 16, 16),
        torch.ones(1, 4, 4).bool(),
    )
    head.eval().denoise_loss(*arguments)
    with pytest.raises(AssertionError, match="exchanged"):
        head.train().denoise_loss(*arguments)
