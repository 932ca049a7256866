"""Find the configs of this project wherever it runs: in a clone, editable, or installed."""

from __future__ import annotations

import difflib
from pathlib import Path, PurePosixPath

SUFFIXES = (".yaml", ".yml", ".py")


def config_root() -> Path:
    """Folder that holds the config tree: inside the installed package, or ``configs/`` of the clone.

    Raises:
        FileNotFoundError: the installation has no configs.
    """
    package = Path(__file__).resolve().parent
    for root in (package / "configs", package.parent / "configs"):
        if root.is_dir():
            return root
    raise FileNotFoundError(f"No configs beside {package}: install jepa_plugins again with 'pip install .'")


def list_configs() -> list[str]:
    """Names of all configs, sorted, relative to the config tree, with forward slashes."""
    root = config_root()
    files = (path.relative_to(root) for path in root.rglob("*") if path.suffix in SUFFIXES)
    return sorted(path.as_posix() for path in files if "__pycache__" not in path.parts)


def find_config(name: str | Path) -> str:
    """Resolve a config by path or by name.

    Args:
        name: an existing file, or a name below the config tree with or without a leading ``configs/``, e.g.
            ``detectron2/mask_jepa/x.yaml``.

    Returns:
        The path as given if it is a file, else the absolute path in the config tree.

    Raises:
        FileNotFoundError: there is no such config; the message lists the close matches.
    """
    if Path(name).is_file():
        return str(name)
    parts = PurePosixPath(Path(name).as_posix()).parts
    relative = PurePosixPath(*(parts[1:] if parts[:1] == ("configs",) else parts)).as_posix()
    known = list_configs()
    if relative in known:
        return str(config_root() / relative)
    matches = _close_matches(relative, known)
    hint = (
        f"close matches: {', '.join(matches)}"
        if matches
        else "jepa_plugins.config_files.list_configs() names all"
    )
    raise FileNotFoundError(f"No config {str(name)!r}, neither as a file nor in {config_root()}; {hint}")


def default_work_dir(name: str | Path) -> str:
    """Folder of a configuration's run below ``work_dirs``, when none is given.

    Of one of this project's: its path below the toolkit's folder, since different ones share a file name, e.g.
    ``work_dirs/dmt_jepa/vit_base16`` for ``mmseg/dmt_jepa/vit_base16.py``. Of any other: its file name without the
    suffix, as mmengine's launchers have it.

    Args:
        name: as `find_config` takes it.

    Raises:
        FileNotFoundError: there is no such config.
    """
    path = Path(find_config(name)).resolve()
    root = config_root().resolve()
    parts = path.relative_to(root).parts[1:] if path.is_relative_to(root) else ()
    return str(Path("work_dirs", *(parts or path.parts[-1:])).with_suffix(""))


def _close_matches(name: str, known: list[str], count: int = 5) -> list[str]:
    """Configs of the same file name first, then of similar file names, then of similar paths."""
    base = PurePosixPath(name).name
    by_base: dict[str, list[str]] = {}
    for config in known:
        by_base.setdefault(PurePosixPath(config).name, []).append(config)
    similar = difflib.get_close_matches(base, list(by_base), n=count)
    candidates = [config for match in similar for config in by_base[match]]
    candidates += difflib.get_close_matches(name, known, n=count)
    return list(dict.fromkeys(candidates))[:count]
