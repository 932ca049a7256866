"""Every command that docs/clusters.md prints has the effective batch of its recipe."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import command
import pytest

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "clusters.md"
VARIABLE = re.compile(r"([A-Z_]+)=(.*)", re.DOTALL)


def printed() -> list[str]:
    """The commands in the document's blocks for a shell."""
    blocks = re.findall(
        r"^```bash\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if shlex.split(line, comments=True)]


def read(line: str) -> tuple[int, str, list[str]]:
    """Processes that a command starts, the tool that each runs, and its arguments."""
    words = shlex.split(line, comments=True)
    given = {}
    while match := VARIABLE.fullmatch(words[0]):
        given[match[1]] = match[2]
        words.pop(0)
    program = words.pop(0)
    if program == "tools/slurm_train.sh":
        world = int(given.get("NODES", 1)) * int(given.get("TASKS_PER_NODE", given.get("GPUS_PER_NODE", 8)))
        config, out, *rest = words
        path, *arguments = command.train_command(config, rest, out=out, resume=True)
        return world, Path(path).name, arguments
    place = next(i for i, word in enumerate(words) if word.startswith("tools/"))
    options = shlex.join(words[:place]).replace("=", " ")
    if program == "python":
        world = 1
    elif program == "torchrun":
        world = number(options, "nnodes") * number(options, "nproc-per-node")
    elif program == "srun":
        assert "--kill-on-bad-exit 1" in options, (
            "a process that fails has to end the others, as in the scripts"
        )
        world = number(options, "nodes") * number(options, "ntasks-per-node")
    else:
        raise AssertionError(f"{program} starts no training that this test knows")
    return world, Path(words[place]).name, words[place + 1 :]


def number(options: str, name: str) -> int:
    """Of an option; 1 without it."""
    found = re.search(rf"--{name} (\d+)", options)
    return int(found[1]) if found else 1


def check_detectron2(arguments: list[str], world: int) -> None:
    """As the trainer does before it reads data."""
    pytest.importorskip("detectron2")
    import train_net

    from jepa_plugins.config_files import find_config
    from jepa_plugins.d2.cli import configuration
    from jepa_plugins.d2.engine import check_batch

    args = train_net.build_parser().parse_args(arguments)
    cfg = configuration(find_config(args.config_file), args.opts)
    assert cfg.SOLVER.RECIPE_IMS_PER_BATCH > 0, "no recipe to hold the batch to"
    check_batch(cfg, world)


def check_pretraining(arguments: list[str], world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As mmengine's loop does, with as many images as the recipe wants."""
    pytest.importorskip("mmengine")
    import train

    from jepa_plugins.mm import data, loops

    monkeypatch.setattr(data, "get_world_size", lambda: world)
    cfg = train.configuration(train.build_parser().parse_args(arguments))
    assert cfg.train_cfg.type == "PretrainLoop" and cfg.train_cfg.recipe.batch > 0
    images, loader = range(cfg.train_cfg.recipe.images), cfg.train_dataloader
    drop_last = loader.batch_sampler.drop_last
    sampler = data.RunBatchSampler(data.EpochSampler(images, seed=0), loader.batch_size, drop_last)
    sampler.accumulation = cfg.optim_wrapper.accumulative_counts
    steps = loops.run_length(cfg.train_cfg.epochs, cfg.train_cfg.get("steps"), sampler.steps_per_epoch)
    loops.check_recipe(cfg.train_cfg.recipe, sampler, steps)


def check(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise ValueError where the tool would refuse the command's batch."""
    world, tool, arguments = read(line)
    if tool == "train_net.py":
        check_detectron2(arguments, world)
    elif tool == "train.py":
        check_pretraining(arguments, world, monkeypatch)
    else:
        raise AssertionError(f"{tool} trains nothing that this test knows")


@pytest.mark.parametrize("line", printed())
def test_a_printed_command_has_its_recipes_batch(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(line, monkeypatch)


def test_the_document_prints_each_way_to_start() -> None:
    programs = {re.sub(r"^([A-Z_]+=(\"[^\"]*\"|\S*) )*", "", line).split()[0] for line in printed()}
    assert programs == {"python", "torchrun", "srun", "tools/slurm_train.sh"}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "python tools/train.py mmseg/dmt_jepa/vit_base16.py",
            "batch 256 instead of 2,048.*set optim_wrapper.accumulative_counts=8 for",
        ),
        (
            "srun --nodes=2 --ntasks-per-node=8 --kill-on-bad-exit=1 "
            "python tools/train.py mmseg/dmt_jepa/vit_base16.py",
            "batch 4,096 instead of 2,048",
        ),
        (
            "NODES=3 tools/slurm_train.sh detectron2/mask_jepa/R50_in1k.yaml out",
            "must be a multiple of 24 processes",
        ),
        (
            "torchrun --nproc-per-node 4 tools/train_net.py --config-file detectron2/mask_jepa/R50_in1k.yaml "
            "SOLVER.IMS_PER_BATCH 16",
            "effective batch is 16, the recipe's 32",
        ),
    ],
)
def test_another_batch_would_be_seen(line: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=sentence):
        check(line, monkeypatch)
