"""Configurations are read without running code."""

import pytest

pytest.importorskip("detectron2")

from jepa_plugins.d2.config import get_config  # noqa: E402
from jepa_plugins.d2.yaml_files import read_yaml  # noqa: E402


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_the_published_pattern_is_parsed(tmp_path):
    path = write(
        tmp_path,
        "a.yaml",
        'SIZES: !!python/object/apply:eval ["[int(x * 0.1 * 512) for x in range(5, 21)]"]\n',
    )
    assert read_yaml(path) == {"SIZES": [int(x * 0.1 * 512) for x in range(5, 21)]}


@pytest.mark.parametrize(
    "text",
    [
        "OUTPUT_DIR: !!python/object/apply:eval [\"open('{touched}', 'w').name\"]\n",
        'OUTPUT_DIR: !!python/object/apply:os.system ["touch {touched}"]\n',
        "OUTPUT_DIR: !!python/name:os.system\n",
        'OUTPUT_DIR: !!python/object/apply:eval ["[int(x * 0.1 * 512) for x in range(5, 21)] or exit()"]\n',
    ],
)
def test_any_other_code_is_refused_with_file_and_line(tmp_path, text):
    touched = tmp_path / "touched"
    path = write(tmp_path, "b.yaml", "SEED: 1\n" + text.replace("{touched}", str(touched)))
    with pytest.raises(ValueError, match=r"b\.yaml, line 2: .*plain yaml"):
        get_config(path)
    assert not touched.exists()


def test_broken_yaml_and_wrong_types_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"c\.yaml, line 2"):
        get_config(write(tmp_path, "c.yaml", "SEED: 1\nOUTPUT_DIR: ]\n"))
    with pytest.raises(ValueError, match=r"d\.yaml.*holds no KEY: VALUE"):
        get_config(write(tmp_path, "d.yaml", "just words\n"))
    with pytest.raises(ValueError, match=r"e\.yaml or the command line: .*SEED"):
        get_config(write(tmp_path, "e.yaml", "SEED: [1]\n"))


def test_bases_are_merged_at_every_depth(tmp_path):
    write(tmp_path, "base.yaml", "A:\n  X: 1\n  Y: 2\nB: 3\n")
    (tmp_path / "sub").mkdir()
    middle = write(tmp_path / "sub", "middle.yaml", "_BASE_: ../base.yaml\nA:\n  Y: 5\n")
    assert read_yaml(middle) == {"A": {"X": 1, "Y": 5}, "B": 3}


def test_a_missing_base_and_a_circle_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml \(the _BASE_ of .*f\.yaml\)"):
        read_yaml(write(tmp_path, "f.yaml", "_BASE_: gone.yaml\n"))
    write(tmp_path, "g.yaml", "_BASE_: h.yaml\n")
    with pytest.raises(ValueError, match="its own _BASE_"):
        read_yaml(write(tmp_path, "h.yaml", "_BASE_: g.yaml\n"))
