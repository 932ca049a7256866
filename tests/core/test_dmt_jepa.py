"""DMT-JEPA: aggregation against plain references, options, gradients, targets."""

import copy

import pytest
import torch
import torch.nn.functional as F

from jepa_plugins.core import dmt_jepa
from jepa_plugins.core.aggregation import AggregationHead, pooled_context, pooled_targets
from jepa_plugins.core.dmt_jepa import IJEPA, DMTJEPAModel, DMTJEPASettings
from jepa_plugins.core.multiblock import MultiBlock, draw_masks
from jepa_plugins.core.neighbours import Neighbourhood, Neighbours, choose_neighbours, shared_with
from jepa_plugins.core.vit import Predictor, VisionTransformer

GRID, WIDTH, HEADS = (6, 7), 24, 3


def make(settings=None, **options) -> DMTJEPAModel:
    torch.manual_seed(0)
    encoder = VisionTransformer((48, 56), 8, width=WIDTH, depth=2, heads=HEADS)
    predictor = Predictor(encoder.grid, WIDTH, width=12, depth=2, heads=HEADS)
    return DMTJEPAModel(encoder, predictor, settings or DMTJEPASettings(**options), total_steps=10)


def batch(count: int = 3):
    torch.manual_seed(1)
    return torch.randn(count, 3, 48, 56), draw_masks(MultiBlock(), GRID, 0, torch.arange(count), 0)


def random_head() -> AggregationHead:
    torch.manual_seed(2)
    head = AggregationHead(WIDTH, HEADS)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head


# --- aggregation


def one_attention(block, query, tokens):
    """query [1, D], tokens [n, D], both normed -> [1, D], head by head."""
    attn, size = block.attn, WIDTH // HEADS
    q, k, v = attn.q(query), attn.k(tokens), attn.v(tokens)
    parts = []
    for h in range(HEADS):
        cut = slice(h * size, (h + 1) * size)
        weights = (q[:, cut] @ k[:, cut].T / size**0.5).softmax(-1)
        parts.append(weights @ v[:, cut])
    return attn.proj(torch.cat(parts, -1))


def mlp(block, x):
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def reference_target(head, patches, near, kind, residual):
    """One patch: patches [N, D] of its image, near [k, D]."""
    query, tokens = patches.mean(0, keepdim=True), near
    for depth, block in enumerate(head.blocks):
        both = block.norm1(torch.cat([query, tokens]))
        keep = query if residual or depth else torch.zeros_like(query)
        if kind == "self":
            read = torch.cat([one_attention(block, both[i : i + 1], both) for i in range(len(both))])
            out = mlp(block, torch.cat([keep, tokens]) + read)
            query, tokens = out[:1], out[1:]
        else:
            query = mlp(block, keep + one_attention(block, both[:1], both))
    return head.norm(query)[0]


@pytest.mark.parametrize("kind", ["cross", "self"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("border", ["shift", "mask"])
def test_learned_targets_patch_by_patch(kind, residual, border) -> None:
    if kind == "self" and border == "mask":
        pytest.skip("refused: see test_settings_that_make_no_sense")
    head, patches = random_head(), torch.randn(2, 42, WIDTH)
    chosen = choose_neighbours(patches, GRID, Neighbourhood(border=border))
    got = head.targets(patches, chosen, kind, residual)
    for image, patch in ((0, 0), (0, 20), (1, 6), (1, 41)):
        index = chosen.index[image, patch]
        if chosen.valid is not None:
            index = index[chosen.valid[image, patch]]
        want = reference_target(head, patches[image], patches[image, index], kind, residual)
        assert torch.allclose(got[image, patch], want, atol=1e-4)


@pytest.mark.parametrize("kind", ["cross", "self"])
@pytest.mark.parametrize("residual", [True, False])
def test_without_neighbours_all_patches_are_read(kind, residual) -> None:
    head, patches = random_head(), torch.randn(2, 42, WIDTH)
    got = head.targets(patches, None, kind, residual)
    for image in range(2):
        want = reference_target(head, patches[image], patches[image], kind, residual)
        assert torch.allclose(got[image], want.expand(42, -1), atol=1e-4)


@pytest.mark.parametrize("readout", ["broadcast", "token"])
def test_learned_context(readout) -> None:
    head, tokens = random_head(), torch.randn(1, 9, WIDTH)
    got, z, extra = head.context(tokens, "cross", readout)[0], tokens[0], None
    for block in head.blocks:
        query = z.mean(0, keepdim=True) if extra is None else extra
        both = block.norm1(torch.cat([query, z]))
        read = one_attention(block, both[:1], both)
        if readout == "token":
            extra = mlp(block, query + read)
        else:
            z = mlp(block, z + read)
    assert torch.allclose(got, head.norm(z if extra is None else torch.cat([z, extra])), atol=1e-5)


def test_parameter_free_is_equation_4() -> None:
    patches = torch.randn(2, 42, WIDTH)
    chosen = choose_neighbours(patches, GRID, Neighbourhood())
    got = pooled_targets(patches, chosen, "cross", False)
    near, mean = patches[1, chosen.index[1, 5]], patches[1].mean(0)
    weights = (near @ mean / WIDTH**0.5).softmax(0)
    assert torch.allclose(got[1, 5], weights @ near, atol=1e-5)
    assert torch.allclose(
        pooled_targets(patches, chosen, "cross", True)[1, 5], weights @ near + mean, atol=1e-5
    )
    assert torch.allclose(pooled_targets(patches, chosen, "average", False)[1, 5], near.mean(0), atol=1e-5)
    assert torch.equal(pooled_targets(patches, chosen, "max", False)[1, 5], near.amax(0))
    tokens = patches[:, :9]
    mean = tokens.mean(1, keepdim=True)
    weights = (mean @ tokens.transpose(1, 2) / WIDTH**0.5).softmax(-1)
    assert torch.allclose(pooled_context(tokens, "cross", "broadcast"), tokens + weights @ tokens, atol=1e-5)
    assert torch.allclose(pooled_context(tokens, "max", "token")[:, -1], tokens.amax(1))


@pytest.mark.parametrize("kind", ["cross", "average", "max"])
def test_masked_borders_read_only_neighbours(kind) -> None:
    patches = torch.randn(1, 42, WIDTH)
    valid = torch.rand(1, 42, 4) > 0.5
    valid[..., 0] = True
    index = torch.randint(0, 42, (1, 42, 4))
    got = pooled_targets(patches, Neighbours(index, valid), kind, False)
    for patch in (0, 17, 41):
        only = Neighbours(index[:, patch : patch + 1, valid[0, patch]].expand(1, 42, -1), None)
        assert torch.allclose(got[0, patch], pooled_targets(patches, only, kind, False)[0, patch], atol=1e-5)


# --- the whole step

OPTIONS = [
    {},
    {"lat": "parameter_free"},
    {"target": "self", "context_attention": "self"},
    {"context_attention": "self"},
    {"context": "token"},
    {"lat": "parameter_free", "context": "token", "context_attention": "max"},
    {"target": "average", "context": "none"},
    {"target": "max", "context": "none"},
    {"neighbourhood": None},
    {"neighbourhood": Neighbourhood(window=0)},
    {"neighbourhood": Neighbourhood(window=5, k=8, border="wrap", include_self=True)},
    {"neighbourhood": Neighbourhood(border="mask")},
    {"loss": "smooth_l1"},
    {"residual": False},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_trains_what_it_should(options) -> None:
    model = make(**options).train()
    images, masks = batch()
    out = model(images, masks)
    out.losses["loss"].backward()
    assert bool(out.losses["loss"].isfinite())
    for name, parameter in model.named_parameters():
        if name.startswith(("encoder.", "predictor.", "context_head.")) and "pos_embed" not in name:
            assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name
        else:
            assert parameter.grad is None and not parameter.requires_grad, name
    assert ("neighbours_by_position" in out.metrics) == (
        model.settings.neighbourhood is not None and model.settings.target != "none"
    )
    assert out.maps["target"].shape == (3, 42, WIDTH)


def test_ijepa_is_ijepa() -> None:
    model, (images, masks) = make(IJEPA), batch()
    assert model.context_head is None and model.target_head is None
    with torch.no_grad():
        target = F.layer_norm(model.target_encoder(images), (WIDTH,))
        context = model.encoder(images, masks.context)
        predicted = model.predictor(context, masks.context, masks.targets, GRID)
        aim = torch.stack([target[b, masks.targets[b, m]] for m in range(4) for b in range(3)])
        want = F.smooth_l1_loss(predicted, aim)
    assert torch.allclose(model(images, masks).losses["loss"], want)


@pytest.mark.parametrize("options", [{}, {"lat": "parameter_free"}, {"neighbourhood": None}])
def test_an_images_targets_do_not_depend_on_its_batch(options) -> None:
    model, (images, _) = make(**options), batch()
    together, _ = model.targets(images)
    alone, _ = model.targets(images[1:2])
    assert torch.allclose(together[1], alone[0], atol=1e-5)
    images[2] += 1
    assert torch.equal(model.targets(images)[0][:2], together[:2])


def test_hidden_patches_do_not_reach_the_prediction() -> None:
    model, (images, masks) = make().eval(), batch()
    before = model.predict(images, masks)
    changed = images.clone()
    for i, context in enumerate(masks.context):
        patches = changed[i].unfold(1, 8, 8).unfold(2, 8, 8)  # a view: [3, 6, 7, 8, 8]
        hidden = torch.ones(42, dtype=torch.bool)
        hidden[context] = False
        patches[:, hidden.view(GRID)] = 9.0
    assert not torch.equal(changed, images)
    assert torch.allclose(model.predict(changed, masks), before, atol=1e-5)


def test_targets_move_by_ema_alone() -> None:
    model = make()
    online = [*model.encoder.parameters(), *model.context_head.parameters()]
    target = [*model.target_encoder.parameters(), *model.target_head.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(online, target, strict=True))
    with torch.no_grad():
        for parameter in online:
            parameter.add_(1.0)
    before = [parameter.clone() for parameter in target]
    assert model.update_target() == 0.996 and int(model.step) == 1
    for now, was, new in zip(target, before, online, strict=True):
        assert torch.allclose(now, 0.996 * was + 0.004 * new, atol=1e-6)
    assert model.train().target_encoder.training is False


def test_the_device_is_asked_for_the_step_once(monkeypatch) -> None:
    model, reads = make(), []
    read = torch.Tensor.__int__
    monkeypatch.setattr(torch.Tensor, "__int__", lambda tensor: reads.append(tensor) or read(tensor))
    momenta = [model.update_target() for _ in range(4)]
    assert len(reads) == 1 and model.steps_done == 4
    assert momenta == pytest.approx([0.996 + 0.004 * i / 10 for i in range(4)])
    assert read(model.step) == 4
    model.load_state_dict({**model.state_dict(), "step": torch.tensor(9)})
    assert model.steps_done == 9 and model.ema_momentum() == pytest.approx(0.9996)
    assert copy.deepcopy(model).steps_done == 9


def test_neighbours_by_position_are_chosen_once(monkeypatch) -> None:
    model, (images, masks), tables = make(), batch(), []

    def counted(features, grid, settings):
        if len(features) == 1:  # the table of positions; a batch has three images
            tables.append(grid)
        return choose_neighbours(features, grid, settings)

    monkeypatch.setattr(dmt_jepa, "choose_neighbours", counted)
    names = list(model.state_dict())
    first, again = (model(images, masks).metrics["neighbours_by_position"] for _ in range(2))
    assert tables == [GRID] and torch.equal(first, again) and list(model.state_dict()) == names
    other = draw_masks(MultiBlock(), (8, 12), 0, torch.arange(2), 0)
    model(torch.randn(2, 3, 64, 96), other)
    assert tables == [GRID, (8, 12)]
    # another table chooses others
    table = torch.randn_like(model.encoder.pos_embed)
    model.load_state_dict({**model.state_dict(), "encoder.pos_embed": table})
    got = model(images, masks).metrics["neighbours_by_position"]
    _, chosen = model.targets(images)
    want = shared_with(chosen, choose_neighbours(table, GRID, Neighbourhood()))
    assert torch.equal(got, want) and not torch.equal(got, first)


def test_what_is_remembered_compiles() -> None:
    model, (images, _) = make(), batch()
    patches = torch.randn(2, 42, WIDTH)

    def read() -> tuple[torch.Tensor, int]:
        return model.by_position(choose_neighbours(patches, GRID, Neighbourhood()), images), model.steps_done

    torch._dynamo.reset()
    compiled = torch.compile(read, backend="eager")
    for step in range(3):
        got, want = compiled(), read()
        assert torch.equal(got[0], want[0]) and got[1] == want[1] == step
        model.update_target()


def test_rectangular_and_other_sizes_resample_positions() -> None:
    model = make()
    other = torch.randn(2, 3, 64, 96)
    masks = draw_masks(MultiBlock(), (8, 12), 0, torch.arange(2), 0)
    assert bool(model(other, masks).losses["loss"].isfinite())
    with pytest.raises(ValueError, match="60x56 pixels is no whole number of 8x8 patches"):
        model(torch.randn(1, 3, 60, 56), masks)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lat": "none"}, "lat is one of learned, parameter_free"),
        ({"target": "mean"}, "target is one of cross, self, average, max, none"),
        ({"context": "mean"}, "context is one of broadcast, token, none"),
        ({"loss": "l1"}, "loss is one of mse, smooth_l1"),
        ({"depth": 0}, "at least one block, got depth 0"),
        ({"lat": "parameter_free", "target": "self"}, "self-attention without parameters"),
        ({"context": "none"}, "moving average of the context head"),
        ({"context_attention": "max"}, "moving average of the context head"),
        ({"context": "token", "context_attention": "self"}, "no aggregate to make a token of"),
        (
            {"target": "self", "neighbourhood": Neighbourhood(border="mask")},
            "self-attention over neighbours needs as many at every patch",
        ),
    ],
)
def test_settings_that_make_no_sense(options, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        DMTJEPASettings(**options)


def test_activation_checkpointing_changes_nothing() -> None:
    plain, saving = make().train(), make().train()
    saving.encoder.checkpointing = True
    images, masks = batch()
    losses = []
    for model in (plain, saving):
        loss = model(images, masks).losses["loss"]
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    for a, b in zip(plain.encoder.parameters(), saving.encoder.parameters(), strict=True):
        assert a.grad is b.grad is None or torch.allclose(a.grad, b.grad, atol=1e-7)
