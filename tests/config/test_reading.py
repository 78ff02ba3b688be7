"""The schema's rules and messages, searchable sections, canonical forms, and exact counts."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prunetune.config import document, space
from prunetune.config import reading as configuration
from prunetune.config.canonical import canonical, digest, is_active, kept
from prunetune.config.schema import (
    Config,
    CriterionConfig,
    EarlyStoppingConfig,
    PostPruningConfig,
    PrePruningConfig,
)
from prunetune.errors import ConfigError, UserError, did_you_mean
from prunetune.stages.plan import most_epochs

MINIMAL = """\
name: run
data:
  name: digits
model:
  name: mlp
densities: [0.1]
post_pruning:
  epochs: 2
  optimizer:
    name: adam
    lr: 1e-3
"""

SWEEP = """\
name: sweep
seed: {choice: [0, 1]}
data: {name: digits, batch_size: {choice: [64, 128]}}
model: {name: mlp, hidden: {choice: [[16], [32, 32]]}}
densities: [0.1, 0.01]
pre_pruning:
  epochs: 2
  optimizer: {name: adam, lr: {loguniform: [3.0e-4, 1.0e-2]}}
  mask:
    choice:
      - null
      - lambda1: {loguniform: [1.0e-7, 1.0e-4]}
        lambda2: {choice: [0, 1e-3]}
        lambda2_warmup: {uniform: [0, 1]}
post_pruning:
  epochs: {int: [1, 3]}
  optimizer:
    choice:
      - {name: adam, lr: 1e-3}
      - {name: sgd, lr: {loguniform: [0.01, 1]}, momentum: {uniform: [0, 0.9]}}
  label_smoothing: {alpha0: {choice: [0, 0.1]}, horizon: {uniform: [0.1, 1]}}
"""


def source(text: str = MINIMAL, *overrides: str) -> document.Document:
    return document.override(document.parse(text, "f.yaml"), overrides)


def loaded(*overrides: str) -> Config:
    return configuration.from_document(source(MINIMAL, *overrides))


def message(*overrides: str, text: str = MINIMAL) -> str:
    with pytest.raises(ConfigError) as error:
        configuration.from_document(source(text, *overrides))
    return str(error.value)


def test_a_minimal_file_takes_the_defaults() -> None:
    config = loaded()
    assert config.pre_pruning is None
    assert config.data.batch_size == 128
    assert config.model.hidden == [100] * 5  # type: ignore[union-attr]
    assert config.post_pruning.optimizer.schedule.name == "constant"
    assert config.pruning.criterion.name == "magnitude"
    assert config.density == 0.1


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("densities=[0]", "densities.0 = 0: must be greater than 0"),
        ("densities=[2]", "densities.0 = 2: must be less than or equal to 1"),
        ("densities=[]", "densities = []: "),
        ("densities=[0.1, 0.01, 0.1]", "the density 0.1 is written twice"),
        ("densities=[1, 1.0]", "the density 1 is written twice"),
        ("densities=0.1", "densities = 0.1: must be a valid list"),
        ("densities=[.nan]", "densities.0 = nan: must be"),
        ("post_pruning.epochs=0", "post_pruning.epochs = 0: must be greater than or equal to 1"),
        ("post_pruning.epochs=2.5", "post_pruning.epochs = 2.5: must be a valid integer"),
        ("post_pruning.epochs=true", "post_pruning.epochs = True: must be a valid integer"),
        ("post_pruning.epochs='3'", "post_pruning.epochs = '3': must be a valid integer"),
        ("post_pruning.optimizer.lr=0", "post_pruning.optimizer.lr = 0: must be greater than 0"),
        ("post_pruning.optimizer.lr=.inf", "post_pruning.optimizer.lr = inf: must be a finite number"),
        ("post_pruning.optimizer.lr=fast", "post_pruning.optimizer.lr = 'fast': must be a valid number"),
        (
            "post_pruning.optimizer={name: sgd, lr: 1, momentum: 1}",
            "optimizer.momentum = 1: must be less than 1",
        ),
        ("post_pruning.optimizer=adam", "post_pruning.optimizer.lr: is required"),
        ("post_pruning.optimizer=3", "post_pruning.optimizer = 3: must be a mapping of keys"),
        ("post_pruning=null", "post_pruning = null: must be a mapping of keys"),
        ("post_pruning.label_smoothing={alpha0: 0.1, horizon: 0}", "horizon = 0: must be greater than 0"),
        ("post_pruning.soft_skip={gamma0: 0.1, horizon: 1.5}", "must be less than or equal to 1"),
        (
            "post_pruning.soft_activation={beta0: 1, horizon: 0}",
            "soft_activation.horizon = 0: must be greater",
        ),
        ("post_pruning.soft_activation={beta0: -1}", "soft_activation.beta0 = -1: must be greater than or"),
        ("post_pruning.label_smoothing={alpha0: 1}", "label_smoothing.alpha0 = 1: must be less than 1"),
        ("post_pruning.optimizer.schedule={name: step, milestones: [0.7, 0.5]}", "must rise"),
        ("data.validation_fraction=1", "data.validation_fraction = 1: must be less than 1"),
        ("data.validation_fraction=0", "data.validation_fraction = 0: must be greater than 0"),
        ("data.batch_size=0", "data.batch_size = 0: must be greater than or equal to 1"),
        ("model.hidden=[]", "model.hidden = []: "),
        ("model.hidden=[10, 0]", "model.hidden.1 = 0: must be greater than or equal to 1"),
        ("model=mpl", "model = 'mpl': must be one of mlp, vgg16"),
        ("model=[mlp]", "model = ['mlp']: must be a mapping of keys"),
        ("seed=-1", "seed = -1: must be greater than or equal to 0"),
        ("name=a/b", "name = 'a/b': must be letters, digits, '.', '_' or '-'"),
        ("name=.hidden", "start with a letter or digit"),
        ("name=store", "name of the store's own folder"),
        ("name=7", "name = 7: must be a valid string"),
        ("storage=''", "storage = ''"),
        ("resources.cpus=1.5", "resources.cpus = 1.5: above 1 it must be a whole number"),
        ("search.trials_per_density=0", "search.trials_per_density = 0: must be greater"),
    ],
)
def test_impossible_values_and_wrong_types_are_named_with_their_rule(override: str, rule: str) -> None:
    text = message(override)
    assert text.startswith("command line: ")
    assert rule in text


def test_an_error_names_file_line_key_value_and_rule() -> None:
    assert (
        message(text=MINIMAL.replace("lr: 1e-3", "lr: -1"))
        == "f.yaml:11: post_pruning.optimizer.lr = -1: must be greater than 0"
    )


def test_all_problems_are_named_at_once() -> None:
    text = message(text=MINIMAL.replace("epochs: 2", "epochs: 0").replace("[0.1]", "[3]"))
    assert text.splitlines() == [
        "f.yaml:6: densities.0 = 3: must be less than or equal to 1",
        "f.yaml:8: post_pruning.epochs = 0: must be greater than or equal to 1",
    ]


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("post_pruning.epoch=3", "post_pruning.epoch", "epochs"),
        ("postpruning={}", "postpruning", "post_pruning"),
        ("post_pruning.optimizer.learning=1", "post_pruning.optimizer.learning", None),
        ("model.hiden=[1]", "model.hiden", "hidden"),
        ("pre_pruning={epochs: 1, optimizer: {name: sgd, lr: 1, momentun: 0}}", "momentun", "momentum"),
        ("pre_pruning.mask.lamda2=1", "pre_pruning.mask.lamda2", "lambda2"),
        ("post_pruning.optimizer.schedule={nam: cosine}", "optimizer.schedule.nam", "name"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(
    override: str, key: str, nearest: str | None
) -> None:
    line = next(line for line in message(override).splitlines() if "unknown key" in line)
    assert f"{key}: unknown key" in line
    if nearest is None:
        assert line.endswith("known here: name, schedule, lr, weight_decay")
    else:
        assert line.endswith(f"did you mean {nearest!r}?")


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("data.name=minst", "mnist"),
        ("post_pruning.optimizer.name=Adamw", "adamw"),
        ("pre_pruning={epochs: 1, optimizer: {name: sgd, lr: 1}, initializer: kaimming}", "kaiming"),
        ("model.name=resnet", "resnet20"),
        ("model.name=vgg-16", "vgg16"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_known_one(override: str, nearest: str) -> None:
    assert f"did you mean {nearest!r}?" in message(override)


def test_did_you_mean_is_silent_when_nothing_is_near() -> None:
    assert did_you_mean("xyzzy", ["epochs", "optimizer"]) == ""


def test_missing_keys_are_required_at_the_line_of_their_section() -> None:
    text = message(text=MINIMAL.replace("    name: adam\n", "").replace("  name: mlp", "  hidden: [3]"))
    assert text.splitlines() == [
        "f.yaml:4: model.name: is required",
        "f.yaml:9: post_pruning.optimizer.name: is required",
    ]


def test_a_users_model_is_an_import_path_with_further_keys() -> None:
    config = loaded("model={name: 'torch.nn:Linear', in_features: 3, out_features: 2}")
    assert config.model.name == "torch.nn:Linear"
    assert config.model.options == {"in_features": 3, "out_features": 2}
    assert "model.in_feature: unknown key; did you mean 'in_features'?" in message(
        "model={name: 'torch.nn:Linear', in_feature: 3, out_features: 2}"
    )
    assert "must be one of mlp, vgg16" in message("model.name='no-module:Net'")


def narrow(in_channels: int, num_classes: int, limit: int = 3) -> Any:
    """A user's constructor; never called here."""
    raise NotImplementedError


def few(root: str, *, limit: int = 60) -> Any:
    """A user's data source; never called here."""
    raise NotImplementedError


def test_a_field_of_the_section_that_a_users_component_takes_is_given_to_it() -> None:
    model = f"model={{name: '{__name__}:narrow', in_channels: 1}}"
    config = loaded(model, f"data={{name: '{__name__}:few', limit: 40}}")
    assert (config.model.in_channels, config.model.options) == (1, {"in_channels": 1})
    assert (config.data.limit, config.data.options) == (40, {"limit": 40})
    assert Config.model_validate(config.tree()) == config
    assert "model.in_channels: is required" in message(model.replace("1}", "null}"))
    config = loaded(f"data={{name: '{__name__}:few'}}")  # which has its own default
    assert (config.data.limit, config.data.options) == (None, {})
    assert Config.model_validate(config.tree()) == config


def test_short_forms_of_named_sections() -> None:
    config = loaded("post_pruning.optimizer.schedule=cosine", "search.early_stopping=asha")
    assert config.post_pruning.optimizer.schedule.name == "cosine"
    assert config.search.early_stopping == EarlyStoppingConfig()
    assert loaded("search.early_stopping=null").search.early_stopping is None


def test_load_reads_a_file_with_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    assert configuration.load(str(path), ["densities=[1e-3]"]).density == 0.001
    path.write_text(MINIMAL.replace("epochs: 2", "epochs: x"))
    with pytest.raises(ConfigError, match=r"run\.yaml:8: post_pruning\.epochs"):
        configuration.load(str(path))


def test_a_training_run_has_values_and_one_density() -> None:
    assert message("post_pruning.optimizer.lr={uniform: [0.1, 1]}") == (
        "command line: post_pruning.optimizer.lr: is a distribution (uniform [0.1, 1]); "
        "a training run needs a value (a sweep finds one)"
    )
    assert "a training run has one density" in message("densities=[0.1, 0.2]")
    with pytest.raises(ValueError, match="needs one density"):
        _ = Config.model_validate({**loaded().tree(), "densities": [0.1, 0.2]}).density


def test_at_gives_the_configuration_for_one_density() -> None:
    config = Config.model_validate({**loaded().tree(), "densities": [0.1, 0.2]})
    assert config.at(0.2).density == 0.2
    assert config.densities == [0.1, 0.2]


@pytest.mark.parametrize(
    "override",
    [
        "densities=[{uniform: [0.1, 0.2]}]",
        "densities={choice: [[0.1], [0.2]]}",
        "name={choice: [a, b]}",
        "storage={choice: [a, b]}",
        "search.trials_per_density={int: [1, 3]}",
        "resources.cpus={int: [1, 2]}",
        "tracking.experiment={choice: [a, b]}",
    ],
)
def test_a_distribution_outside_the_searchable_sections_is_an_error(override: str) -> None:
    with pytest.raises(ConfigError, match=r"^command line: .*cannot be searched; give a value"):
        configuration.sweep_from_document(source(MINIMAL, override))


def test_a_sweep_gives_its_template_and_a_representative() -> None:
    template, representative = configuration.sweep_from_document(source(SWEEP))
    assert representative.densities == [0.1, 0.01]
    assert representative.seed == 0
    assert representative.pre_pruning is not None
    assert representative.pre_pruning.optimizer.lr == 3e-4
    assert list(space.parameters(template, is_active)) == [
        "seed",
        "data.batch_size",
        "model.hidden",
        "pre_pruning.optimizer.lr",
        "pre_pruning.mask",
        "post_pruning.epochs",
        "post_pruning.optimizer",
        "post_pruning.label_smoothing.alpha0",
        "pre_pruning.mask[on].lambda1",
        "pre_pruning.mask[on].lambda2",
        "post_pruning.optimizer[sgd].lr",
        "post_pruning.optimizer[sgd].momentum",
        "post_pruning.label_smoothing.horizon",
        "pre_pruning.mask[on].lambda2_warmup",
    ]


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        (
            "post_pruning.optimizer.lr={uniform: [0, 1]}",
            "post_pruning.optimizer.lr = 0.0: must be greater than 0",
        ),
        ("post_pruning.epochs={int: [0, 3]}", "post_pruning.epochs = 0: must be greater"),
        ("post_pruning.epochs={uniform: [1, 3]}", "post_pruning.epochs = 1.0: must be a valid integer"),
        (
            "post_pruning.optimizer.name={choice: [adam, rmsprop]}",
            "= 'rmsprop': must be one of sgd, adam, adamw, or an import path 'package.module:object'",
        ),
        (
            "post_pruning.label_smoothing={choice: [null, {alpha0: {uniform: [0, 1]}}]}",
            "post_pruning.label_smoothing.alpha0 = 1.0: must be less than 1",
        ),
        (
            # only reached where alpha0 > 0
            "post_pruning.label_smoothing={alpha0: {choice: [0, 0.1]}, horizon: {uniform: [0.5, 2]}}",
            "post_pruning.label_smoothing.horizon = 2.0: must be less than or equal to 1",
        ),
        ("model={choice: [{name: mlp}, {name: vgg16, hidden: [3]}]}", "model.hidden: unknown key"),
    ],
)
def test_a_value_inside_a_distribution_that_breaks_a_rule_is_found_before_the_sweep(
    override: str, rule: str
) -> None:
    with pytest.raises(ConfigError) as error:
        configuration.sweep_from_document(source(MINIMAL, override))
    assert "command line: " in str(error.value)
    assert rule in str(error.value)


def test_a_dumped_configuration_loads_as_the_same_configuration(tiny: dict[str, Any]) -> None:
    config = Config.model_validate(tiny)
    again = configuration.from_document(document.parse(document.dump(config.tree()), "best.yaml"))
    assert again == config
    assert digest(canonical(again)) == digest(canonical(config))


def test_resolved_values_of_a_sweep_dump_to_a_loadable_training_run() -> None:
    template, _ = configuration.sweep_from_document(source(SWEEP))
    answers = {
        "pre_pruning.mask": "on",
        "post_pruning.optimizer": "sgd",
        "pre_pruning.optimizer.lr": 0.00012345678901234567,
        "model.hidden": "[32, 32]",
    }
    tree = space.resolve(template, lambda name, d: answers.get(name, d.probes()[-1]), is_active)
    best = configuration.validate(tree, source(SWEEP)).at(0.01)
    again = configuration.from_document(document.parse(document.dump(best.tree()), "best/density-0.01.yaml"))
    assert again == best
    assert again.density == 0.01
    assert again.pre_pruning is not None
    assert again.pre_pruning.optimizer.lr == 0.00012345678901234567
    assert again.pre_pruning.mask is not None
    assert again.pre_pruning.mask.lambda2 == 1e-3
    assert again.post_pruning.optimizer.momentum == pytest.approx(0.3438, abs=1e-3)


def test_the_parameters_of_a_result_are_recovered_from_its_configuration() -> None:
    text = SWEEP.replace("momentum: {uniform: [0, 0.9]}", "momentum: {uniform: [0, 0.9]}, schedule: cosine")
    template, _ = configuration.sweep_from_document(source(text))
    drawn = random.Random(0)

    def draw(distribution: space.Distribution) -> Any:
        if isinstance(distribution, space.Choice):
            return drawn.choice(distribution.labels)
        if isinstance(distribution, space.Int):
            return drawn.randint(distribution.low, distribution.high)
        return drawn.uniform(distribution.low, distribution.high)

    for _ in range(50):
        params: dict[str, Any] = {}
        tree = space.resolve(
            template, lambda name, d, params=params: params.setdefault(name, draw(d)), is_active
        )
        config = configuration.validate(tree, source(text))
        right = [
            candidate
            for candidate in space.recover(template, config.tree(), is_active)
            if configuration.validate(space.at(template, candidate, is_active), source(text)) == config
        ]
        assert right == [params]


def test_a_result_outside_the_space_is_not_recovered() -> None:
    template, representative = configuration.sweep_from_document(source(SWEEP))
    outside = copy.deepcopy(representative.tree())
    outside["post_pruning"]["epochs"] = 99
    found = [space.at(template, c, is_active) for c in space.recover(template, outside, is_active)]
    assert all(tree["post_pruning"]["epochs"] != 99 for tree in found)


def test_most_epochs_looks_at_the_whole_space() -> None:
    template, _ = configuration.sweep_from_document(source(SWEEP))
    assert most_epochs(template) == (2, 0, 3)
    template, _ = configuration.sweep_from_document(source(MINIMAL))
    assert most_epochs(template).pre_pruning == 0
    written = "pre_pruning={choice: [null, {epochs: {choice: [4, 7, 5]}, optimizer: {name: adam, lr: 1}}]}"
    template, _ = configuration.sweep_from_document(source(MINIMAL, written))
    assert most_epochs(template).pre_pruning == 7
    written = "pre_pruning={epochs: {choice: [4, 7, 5]}, optimizer: {name: adam, lr: 1}}"
    rounds = "pruning={schedule: {name: iterative, rounds: 3, epochs: {choice: [1, 4]}}, rewind: 2}"
    template, _ = configuration.sweep_from_document(source(MINIMAL, written, rounds))
    assert most_epochs(template) == (7, 2 * 4 + 2, 2)


def test_a_name_that_looks_like_a_number_survives_a_dump() -> None:
    config = loaded("name='1e3'")
    assert configuration.from_document(document.parse(document.dump(config.tree()), "best.yaml")) == config


@pytest.mark.parametrize(
    ("key", "siblings", "active"),
    [
        ("pre_pruning.optimizer.momentum", {"name": "sgd"}, True),
        ("pre_pruning.optimizer.momentum", {"name": "adam"}, False),
        ("pre_pruning.optimizer.momentum", {}, False),
        ("post_pruning.optimizer.schedule.factor", {"name": "step"}, True),
        ("post_pruning.optimizer.schedule.factor", {"name": "cosine"}, False),
        ("post_pruning.label_smoothing.horizon", {"alpha0": 0}, False),
        ("post_pruning.label_smoothing.horizon", {"alpha0": 0.1}, True),
        ("post_pruning.soft_skip.horizon", {"gamma0": 0.0}, False),
        ("post_pruning.soft_activation.horizon", {"beta0": 0}, True),  # β = 0 is not "off": it is t/2
        ("pre_pruning.mask.lambda2_warmup", {"lambda2": 0}, False),
        ("pre_pruning.mask.lambda2_warmup", {"lambda2": "wrong"}, True),  # the schema says so
        ("pre_pruning.epochs", {}, True),
    ],
)
def test_is_active(key: str, siblings: dict[str, Any], active: bool) -> None:
    assert is_active(key, siblings) is active


def post(**sections: Any) -> PostPruningConfig:
    return PostPruningConfig.model_validate(
        {"epochs": 2, "optimizer": {"name": "adam", "lr": 0.1}, **sections}
    )


def pre(**sections: Any) -> PrePruningConfig:
    return PrePruningConfig.model_validate(
        {"epochs": 2, "optimizer": {"name": "adam", "lr": 0.1}, **sections}
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (post(), post(optimizer={"name": "adam", "lr": 0.1, "momentum": 0.5, "nesterov": False})),
        (pre(), pre(optimizer={"name": "adam", "lr": 0.1, "momentum": 0.5})),
        (
            post(optimizer={"name": "adam", "lr": 0.1, "schedule": "cosine"}),
            post(
                optimizer={
                    "name": "adam",
                    "lr": 0.1,
                    "schedule": {"name": "cosine", "milestones": [0.1], "factor": 0.5},
                }
            ),
        ),
        (
            post(label_smoothing={"alpha0": 0, "horizon": 0.5}),
            post(label_smoothing={"alpha0": 0.0, "horizon": 0.9}),
        ),
        (post(soft_skip={"gamma0": 0, "horizon": 0.5}), post(soft_skip={"gamma0": 0})),
        (
            pre(mask={"lambda1": 1, "lambda2": 0, "lambda2_warmup": 0.5}),
            pre(mask={"lambda1": 1, "lambda2": 0}),
        ),
    ],
)
def test_configurations_that_compute_the_same_are_equal(one: Any, other: Any) -> None:
    assert canonical(one) == canonical(other)
    assert digest(canonical(one)) == digest(canonical(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            post(optimizer={"name": "sgd", "lr": 0.1, "momentum": 0.5}),
            post(optimizer={"name": "sgd", "lr": 0.1, "momentum": 0.6}),
        ),
        (post(), post(optimizer={"name": "adamw", "lr": 0.1})),
        (post(label_smoothing={"alpha0": 0.1}), post(label_smoothing={"alpha0": 0.1, "horizon": 0.6})),
        (
            pre(mask={"lambda1": 0, "lambda2": 1, "lambda2_warmup": 0.5}),
            pre(mask={"lambda1": 0, "lambda2": 1}),
        ),
        (
            post(optimizer={"name": "adam", "lr": 0.1, "schedule": "step"}),
            post(optimizer={"name": "adam", "lr": 0.1, "schedule": {"name": "step", "factor": 0.5}}),
        ),
        (post(soft_activation={"beta0": 0}), post()),
    ],
)
def test_configurations_that_compute_something_else_are_not(one: Any, other: Any) -> None:
    assert canonical(one) != canonical(other)
    assert digest(canonical(one)) != digest(canonical(other))


def steep(scene: Any, *, power: float = 1.0, sharp: float = 2.0, blunt: float = 0.0) -> dict[str, Any]:
    """A user's criterion; never called here."""
    raise NotImplementedError


steep.counts_when = {  # type: ignore[attr-defined]
    "sharp": ("power", lambda power: power > 0),
    "blunt": ("power", lambda power: power < 0),
}


def test_an_option_of_a_users_counts_by_the_default_of_another_and_is_left_out_where_it_does_not() -> None:
    def form(**options: float) -> Any:
        return canonical(CriterionConfig.model_validate({"name": f"{__name__}:steep", **options}))

    assert form(sharp=3.0)["sharp"] == 3.0
    assert form(power=-1.0, sharp=3.0) == form(power=-1.0)
    assert form(blunt=3.0) == form() != form(sharp=3.0)


def test_canonical_does_not_change_what_it_is_given(tiny: dict[str, Any]) -> None:
    config = Config.model_validate(tiny)
    before = copy.deepcopy(config.tree())
    canonical(config)
    assert config.tree() == before
    assert canonical(None) is None


def test_digest_ignores_the_order_of_keys_only() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest([1, 2]) != digest([2, 1])
    assert digest("a", "b") != digest("ab")
    assert digest(1) != digest("1")
    assert len(digest(1)) == 32


@pytest.mark.parametrize(
    ("density", "weights", "count"),
    [
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996
        (0.57, 100, 57),
        (1.1e-5, 1_000_000, 11),
        (0.001, 119400, 119),
        (0.1, 119400, 11940),
        (1.0, 7, 7),
        (1, 7, 7),
        (0.1, 5, 0),
        (1e-05, 14715584, 147),
    ],
)
def test_kept_is_the_floor_of_the_density_as_it_was_written(density: float, weights: int, count: int) -> None:
    assert kept(density, weights) == count


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 10**4), st.integers(0, 4), st.integers(0, 10**7))
@example(29, 2, 100)
def test_kept_is_exact_for_every_decimal(digits: int, places: int, weights: int) -> None:
    scale = 10 ** (len(str(digits)) + places)
    density = digits / scale  # the float nearest to a decimal like 0.0029
    assert kept(density, weights) == digits * weights // scale


def test_a_configuration_is_frozen_and_a_user_error_is_its_error() -> None:
    config = loaded()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    assert issubclass(ConfigError, UserError)


def test_storage_is_the_environments_where_the_file_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded().storage == "runs"
    monkeypatch.setenv("PRUNETUNE_STORAGE", "s3://bucket/prunetune")
    assert loaded().storage == "s3://bucket/prunetune"
    assert loaded("storage=elsewhere").storage == "elsewhere"
    monkeypatch.setenv("PRUNETUNE_STORAGE", "")
    assert loaded().storage == "runs"


def test_what_is_not_finite_is_a_value_of_its_own_in_keys() -> None:
    values = (None, math.inf, -math.inf, math.nan, 0.0)
    assert len({digest({"ceiling": value}) for value in values}) == len(values)
