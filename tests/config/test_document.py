"""Reading YAML: numbers as people write them, the place of every key, overrides, and dumping."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from prunetune.config import document
from prunetune.errors import ConfigError, UserError

TEXT = """\
name: run
pre_pruning:
  epochs: 3
  optimizer:
    lr: 1e-3
densities:
  - 0.1
  - 0.01
flow: {a: 1,
       b: [2, 3]}
"""


def parsed(text: str = TEXT) -> document.Document:
    return document.parse(text, "f.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        ("-2e-7", -2e-7),
        ("1.5e3", 1500.0),
        ("3.0e-4", 0.0003),
        ("1_000e3", 1e6),
        ("0.5", 0.5),
        ("12", 12),
        ("true", True),
        ("null", None),
        ("'1e-3'", "1e-3"),
        ("e3", "e3"),
        ("1e", "1e"),
        ("v1e3", "v1e3"),
    ],
)
def test_scalars_are_read_as_people_mean_them(text: str, value: object) -> None:
    read = parsed(f"x: {text}\n").tree["x"]
    assert read == value
    assert type(read) is type(value)


def test_every_key_and_list_item_knows_its_line() -> None:
    places = parsed().places
    assert places["name"] == "f.yaml:1"
    assert places["pre_pruning"] == "f.yaml:2"
    assert places["pre_pruning.optimizer.lr"] == "f.yaml:5"
    assert places["densities.0"] == "f.yaml:7"
    assert places["densities.1"] == "f.yaml:8"
    assert places["flow.a"] == "f.yaml:9"
    assert places["flow.b.1"] == "f.yaml:10"


def test_where_falls_back_to_the_nearest_written_parent() -> None:
    source = parsed()
    assert source.where("pre_pruning.optimizer.name") == "f.yaml:4"
    assert source.where("pre_pruning.mask.lambda1") == "f.yaml:2"
    assert source.where("post_pruning.epochs") == "f.yaml"


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a"),
        ("a:\n  b: 1\n  c: 1\n  b: 2\n", 4, "a.b"),
        ("a: {b: 1, b: 2}\n", 1, "a.b"),
        ("a:\n  - b: 1\n    b: 2\n", 3, "a.0.b"),
    ],
)
def test_a_key_written_twice_is_an_error_with_its_line(text: str, line: int, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        parsed(text)
    assert str(error.value) == f"f.yaml:{line}: {key}: this key is written twice"


def test_the_same_key_in_two_sections_is_fine() -> None:
    assert parsed("a: {x: 1}\nb: {x: 2}\n").tree == {"a": {"x": 1}, "b": {"x": 2}}


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("", "f.yaml:1: the file is empty"),
        ("# only a comment\n", "f.yaml:1: the file is empty"),
        ("- 1\n- 2\n", "f.yaml:1: a mapping of keys is expected"),
        ("just words\n", "f.yaml:1: a mapping of keys is expected"),
        ("a: 1\nb: [1, 2\nc: 3\n", "f.yaml:3: not valid YAML"),
        ("a: 1\n\tb: 2\n", "f.yaml:2: not valid YAML"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2: not valid YAML"),
        ("a: 1\nb: !!python/object:os.system {}\n", "f.yaml:2: not valid YAML"),
        ("a: 1\nb: *nowhere\n", "f.yaml:2: not valid YAML"),
    ],
)
def test_what_is_no_mapping_in_yaml_is_an_error_with_a_line(text: str, start: str) -> None:
    with pytest.raises(UserError) as error:
        parsed(text)
    assert str(error.value).startswith(start)


def test_an_impossible_date_is_an_error_not_a_traceback() -> None:
    with pytest.raises(UserError, match=r"f\.yaml"):
        parsed("name: 2024-13-45\n")


def test_a_control_character_is_an_error_not_a_traceback() -> None:
    with pytest.raises(UserError, match=r"f\.yaml"):
        parsed("name: \x07\n")


def test_an_alias_of_its_own_parent_is_an_error_not_a_traceback() -> None:
    with pytest.raises(UserError, match=r"f\.yaml"):
        parsed("a: &x {b: *x}\n")


def test_read_names_the_file_in_every_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.yaml: no such file"):
        document.read(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="is a folder"):
        document.read(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match=r"binary\.yaml: not a text file"):
        document.read(tmp_path / "binary.yaml")
    (tmp_path / "twice.yaml").write_text("a: 1\na: 2\n")
    with pytest.raises(ConfigError, match=r"twice\.yaml:2: a: "):
        document.read(tmp_path / "twice.yaml")


def test_overrides_are_parsed_as_yaml_and_placed_on_the_command_line() -> None:
    source = parsed()
    changed = document.override(
        source, ["pre_pruning.optimizer.lr=1e-2", "densities=[0.1, 1e-3]", "name=other", "flow=null"]
    )
    assert changed.tree["pre_pruning"] == {"epochs": 3, "optimizer": {"lr": 0.01}}
    assert changed.tree["densities"] == [0.1, 0.001]
    assert changed.tree["name"] == "other"
    assert changed.tree["flow"] is None
    assert changed.where("pre_pruning.optimizer.lr") == "command line"
    assert changed.where("densities.1") == "command line"
    assert changed.where("pre_pruning.epochs") == "f.yaml:3"
    assert changed.where("flow.b.1") == "command line"
    assert source.tree == parsed().tree  # the original is untouched
    assert source.places == parsed().places


def test_an_override_makes_missing_and_null_parents() -> None:
    source = parsed("mask: null\n")
    changed = document.override(source, ["mask.lambda2=1e-4", "new.deep.key=true"])
    assert changed.tree == {"mask": {"lambda2": 1e-4}, "new": {"deep": {"key": True}}}


def test_an_override_below_a_components_name_expands_it() -> None:
    source = parsed("pruning: {criterion: grasp, schedule: iterative}\npre_pruning: {mask: target}\n")
    changed = document.override(
        source,
        ["pruning.criterion.temperature=100", "pruning.schedule.rounds=3", "pre_pruning.mask.initial=0.9"],
    )
    assert changed.tree == {
        "pruning": {
            "criterion": {"name": "grasp", "temperature": 100},
            "schedule": {"name": "iterative", "rounds": 3},
        },
        "pre_pruning": {"mask": {"method": "target", "initial": 0.9}},
    }
    assert changed.where("pruning.criterion.name") == "f.yaml:1"


def test_what_numpy_has_made_becomes_plain_values() -> None:
    given = {"densities": list(np.geomspace(0.1, 0.01, 2)), "model": {"hidden": (np.int64(4), 8)}}
    changed = document.override(document.Document("configuration", given), [])
    changed = document.assign(changed, {"seed": np.int64(3), "rates": np.array([0.5, 1.0])}.items(), "here")
    text = document.dump(changed.tree)
    assert text == "densities: [0.1, 0.01]\nmodel:\n  hidden: [4, 8]\nseed: 3\nrates: [0.5, 1.0]\n"
    assert all(type(density) is float for density in changed.tree["densities"])


def test_later_overrides_win_and_may_hold_equal_signs_or_nothing() -> None:
    changed = document.override(parsed(), ["name=a", "name=b=c", "flow="])
    assert changed.tree["name"] == "b=c"
    assert changed.tree["flow"] is None


@pytest.mark.parametrize("assignment", ["name", "=1", "a..b=1", ".a=1", "a.=1"])
def test_an_override_that_is_no_assignment_is_an_error(assignment: str) -> None:
    with pytest.raises(UserError, match=r"command line: .*expected dotted\.key=value"):
        document.override(parsed(), [assignment])


def test_an_override_below_a_scalar_or_list_names_the_parent() -> None:
    with pytest.raises(ConfigError, match=r"^f\.yaml:1: name = 'run': is not a mapping, so name\.x cannot"):
        document.override(parsed(), ["name.x=1"])
    with pytest.raises(ConfigError, match=r"^f\.yaml:6: densities = \[0\.1, 0\.01\]: is not a mapping"):
        document.override(parsed(), ["densities.0=1"])


def test_an_override_below_an_overridden_scalar_names_the_command_line() -> None:
    with pytest.raises(ConfigError, match=r"^command line: flow = 2: is not a mapping"):
        document.override(parsed(), ["flow=2", "flow.a=3"])


@pytest.mark.parametrize("value", ["[1, 2", "{a: ", "2024-13-45", "\x07"])
def test_an_override_whose_value_is_no_yaml_is_an_error(value: str) -> None:
    with pytest.raises(UserError, match="command line"):
        document.override(parsed(), [f"name={value}"])


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=8)
)
TREES = st.dictionaries(
    st.from_regex(r"\A[a-z_][a-z0-9_]{0,8}\Z"),
    st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=5),
    max_size=4,
    min_size=1,
)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(TREES)
def test_a_dumped_tree_reads_back_the_same(tree: dict[str, object]) -> None:
    text = document.dump({"top": tree})
    back = document.parse(text, "f.yaml").tree["top"]
    assert back == tree
    assert repr(back) == repr(tree)  # 1 stays int, 1.0 stays float


@pytest.mark.parametrize(
    "text", ["1e3", "2E-5", "1e-3", "12", "0.5", "true", "null", "~", "", "-", "a: b", "#"]
)
def test_a_dumped_string_stays_a_string(text: str) -> None:
    assert parsed(document.dump({"name": text, "list": [text]})).tree == {"name": text, "list": [text]}


@settings(derandomize=True, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_dumped_floats_are_floats_to_every_yaml_reader(value: float) -> None:
    back = yaml.safe_load(document.dump({"x": value}))["x"]
    assert isinstance(back, float)
    assert back == value


def test_a_dump_keeps_the_order_of_keys_and_puts_short_lists_on_one_line() -> None:
    assert document.dump({"z": 1, "a": [0.1, 1e-05]}) == "z: 1\na: [0.1, 1.0e-05]\n"


@pytest.fixture
def family(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(
        "name: base\noptimizer: {name: adam, lr: {loguniform: [1e-4, 1e-2]}}\n"
        "mask:\n  a: 1\n  b: 2\nlist: [1, 2]\n"
    )
    (tmp_path / "child.yaml").write_text(
        "extends: base.yaml\nname: child\noptimizer: {lr: {uniform: [0, 1]}}\nmask: {b: 3}\nlist: [4]\n"
    )
    return tmp_path


def test_a_file_extends_another_key_by_key(family: Path) -> None:
    child = document.read(family / "child.yaml")
    assert child.tree == {
        "name": "child",
        "optimizer": {"name": "adam", "lr": {"uniform": [0, 1]}},
        "mask": {"a": 1, "b": 3},
        "list": [4],
    }
    assert child.where("mask.a") == f"{family / 'base.yaml'}:4"
    assert child.where("mask.b") == f"{family / 'child.yaml'}:4"
    assert child.where("list.1") == f"{family / 'child.yaml'}:5"


def test_a_grandchild_may_switch_off_and_lie_in_another_folder(family: Path) -> None:
    (family / "sub").mkdir()
    (family / "sub" / "grandchild.yaml").write_text("extends: ../child.yaml\nmask: null\n")
    tree = document.read(family / "sub" / "grandchild.yaml").tree
    assert (tree["mask"], tree["name"]) == (None, "child")


def test_several_files_are_laid_one_over_the_other(family: Path) -> None:
    (family / "piece.yaml").write_text("mask: {c: 9}\nname: piece\n")
    (family / "both.yaml").write_text("extends: [child.yaml, piece.yaml]\nlist: []\n")
    both = document.read(family / "both.yaml")
    assert (both.tree["mask"], both.tree["name"], both.tree["list"]) == (
        {"a": 1, "b": 3, "c": 9},
        "piece",
        [],
    )
    assert both.where("mask.c") == f"{family / 'piece.yaml'}:1"
    assert "extends" not in both.tree


def test_a_uri_is_read_with_what_it_extends(family: Path) -> None:
    (family / "sub").mkdir()
    (family / "sub" / "grandchild.yaml").write_text("extends: ../child.yaml\nmask: null\n")
    document_at_uri = document.read(f"file://{family}/sub/grandchild.yaml")
    assert document_at_uri.tree == document.read(family / "sub" / "grandchild.yaml").tree
    assert document_at_uri.where("mask") == f"file://{family}/sub/grandchild.yaml:2"
    assert document_at_uri.where("optimizer.name") == f"file://{family}/base.yaml:2"


def test_a_uri_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    at = f"file://{tmp_path}"
    with pytest.raises(UserError, match=rf"{at}/none\.yaml: no such file"):
        document.read(f"{at}/none.yaml")
    with pytest.raises(UserError, match=rf"{at}: is a folder"):
        document.read(at)
    with pytest.raises(UserError, match=r"nothing://x/a\.yaml: not a usable location"):
        document.read("nothing://x/a.yaml")
    (tmp_path / "self.yaml").write_text("extends: ./self.yaml\n")
    with pytest.raises(
        UserError, match=r"self\.yaml:1: extends = '\./self\.yaml': a file cannot extend itself"
    ):
        document.read(f"{at}/self.yaml")


@pytest.mark.parametrize(
    ("path", "name", "expected"),
    [
        ("s3://bucket/a/b.yaml?region=eu-west-1", "../c.yaml", "s3://bucket/c.yaml?region=eu-west-1"),
        ("s3://bucket/a/b.yaml", "gs://other/c.yaml", "gs://other/c.yaml"),
        ("a/b.yaml", "s3://bucket/c.yaml", "s3://bucket/c.yaml"),
        ("a/b.yaml", "c/d.yaml", "a/c/d.yaml"),
        ("a/b.yaml", "/d.yaml", "/d.yaml"),
    ],
)
def test_what_a_file_extends_lies_beside_it(path: str, name: str, expected: str) -> None:
    assert document._beside(path, name) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("extends: []\n", r"a\.yaml:1: extends = \[\]: must be the path of a YAML file, or a list"),
        ("extends: nowhere.yaml\n", r"a\.yaml:1: extends = 'nowhere\.yaml': no such file"),
        ("extends: 3\n", r"a\.yaml:1: extends = 3: must be the path of a YAML file"),
        ("extends: a.yaml\n", r"a\.yaml:1: extends = 'a\.yaml': a file cannot extend itself"),
        ("\nextends: b.yaml\n", r"b\.yaml:1: extends = 'a\.yaml': a file cannot extend itself"),
        ("extends: broken.yaml\n", r"broken\.yaml:2: not valid YAML"),
    ],
)
def test_what_cannot_be_extended_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(content)
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    (tmp_path / "broken.yaml").write_text("x: [\n")
    with pytest.raises(UserError, match=message):
        document.read(tmp_path / "a.yaml")
