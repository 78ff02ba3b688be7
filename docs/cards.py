"""Writes docs/methods/: a card per method, from its docstring, its options and what is noted here.

    python docs/cards.py            # write them
    python docs/cards.py --check    # exit 1 where the files are not what this writes

What a method computes is told by its docstring. `NOTES` adds when to use it, which no formula says, and
`PAPERS` the titles behind the numbers that the docstrings cite.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from prunetune import registry

FOLDER = Path(__file__).parent / "methods"

REGISTERED = {
    "criterion": registry.CRITERIA,
    "initializer": registry.INITIALIZERS,
    "mask": registry.MASKS,
    "dynamic": registry.DYNAMICS,
}
"""The kinds whose methods are found in the registry."""


@dataclass(frozen=True)
class Kind:
    """A sort of methods, and where a sweep file names them and sets their options."""

    title: str
    key: str
    section: str = ""
    options: tuple[str, ...] = ()
    """The section's keys that are options of the method; () for all but its name."""


KINDS = {
    "criterion": Kind(
        "Pruning criterion", "pruning.criterion: {name}", "pruning", ("scoring_rounds", "samples_per_class")
    ),
    "initializer": Kind("Initializer", "pre_pruning.initializer: {name}"),
    "mask": Kind("Learnable mask", "pre_pruning.mask.method: {name}", "pre_pruning.mask"),
    "allocation": Kind("Allocation", "pruning.allocation: {name}", "pruning", ("dense_layers",)),
    "structure": Kind("Structure", "pruning.structure: {name}"),
    "schedule": Kind("Pruning schedule", "pruning.schedule.name: {name}", "pruning.schedule"),
    "dynamic": Kind("Dynamic sparse training", "post_pruning.dynamic.name: {name}", "post_pruning.dynamic"),
    "rescaling": Kind("Rescaled initialization", "post_pruning.{name}", "post_pruning.{name}"),
    "soft": Kind("Soft piece", "post_pruning.{name}", "post_pruning.{name}"),
}
"""By the word that `methods` and the files' names use."""


@dataclass(frozen=True)
class Note:
    """What a docstring does not say: what the method is in a sentence, when to use it, whose it is."""

    what: str
    when: str
    papers: tuple[str, ...] = ()
    options: tuple[str, ...] | None = None
    """Of the kind's options, those that this method has; None for all."""


PAPERS = {
    "1502.01852": "He et al., Delving Deep into Rectifiers, 2015",
    "1506.02626": "Han et al., Learning both Weights and Connections for Efficient Neural Networks, 2015",
    "1512.00567": "Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2015",
    "1707.04780": "Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse "
    "Connectivity, 2017",
    "1710.01878": "Zhu and Gupta, To prune, or not to prune, 2017",
    "1803.03635": "Frankle and Carbin, The Lottery Ticket Hypothesis, 2018",
    "1810.02340": "Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity, 2018",
    "1906.10771": "Molchanov et al., Importance Estimation for Neural Network Pruning, 2019",
    "1911.11134": "Evci et al., Rigging the Lottery: Making All Tickets Winners, 2019",
    "2002.07376": "Wang et al., Picking Winning Tickets Before Training by Preserving Gradient Flow, 2020",
    "2006.05467": "Tanaka et al., Pruning neural networks without any data by iteratively conserving "
    "synaptic flow, 2020",
    "2102.08098": "Zhu et al., GradInit: Learning to Initialize Neural Networks for Stable and Efficient "
    "Training, 2021",
    "2104.08378": "Mishra et al., Accelerating Sparse Deep Neural Networks, 2021",
    "2110.12661": "Zhao et al., ZerO Initialization: Initializing Neural Networks with only Zeros and Ones, "
    "2021",
    "2205.15322": "Jaiswal et al., Training Your Sparse Neural Network Better with Any Mask, 2022",
    "2312.01653": "Dogariu, An End-to-End Network Pruning Pipeline with Sparsity Enforcement, 2023",
}
"""Authors, title and year by arXiv number."""

PIPELINE = "2312.01653"

NOTES: dict[tuple[str, str], Note] = {
    ("criterion", "magnitude"): Note(
        "The largest weights stay.",
        "Use it on a trained network; it is the criterion of the paper's pipeline, and the default. After a "
        "learnable mask it is all that is needed, because the mask has set most weights to zero. At "
        "initialization it fails on MNIST at densities of 0.032 and less: under Kaiming's initialization "
        "the first layer has the smallest weights and goes as a whole.",
        ("1506.02626",),
        options=("scoring_rounds",),
    ),
    ("criterion", "random"): Note(
        "Which weights stay is drawn at random.",
        "Use it as the baseline that every other criterion must beat, and to start dynamic sparse training "
        "(`set`, `rigl`), usually with `allocation: erk`.",
        options=(),
    ),
    ("criterion", "snip"): Note(
        "The weights stay whose removal would change the loss most, to first order.",
        "Use it at initialization (`pre_pruning: null`), where it needs one small sample of the data. On "
        "MNIST it is the best criterion without training at a density of 0.1; at 0.01 and less `synflow` is "
        "far better.",
    ),
    ("criterion", "taylor"): Note(
        "The weights stay whose removal would change the loss of the trained network most, to first order.",
        "It is meant for a trained network. On MNIST it is poor there, because the gradients of a sample "
        "that the network fits are mostly noise; prefer `magnitude`.",
    ),
    ("criterion", "grasp"): Note(
        "The weights stay that keep the gradient's norm high after pruning.",
        "Use it at initialization (`pre_pruning: null`). It takes second derivatives, so scoring needs more "
        "memory than `snip`, and on MNIST it is below `snip` at every density.",
    ),
    ("criterion", "synflow"): Note(
        "The weights stay that carry most of the flow from input to output; no data is looked at.",
        "Use it at initialization (`pre_pruning: null`) at low densities: it prunes in many rounds, and so "
        "keeps paths from input to output. On MNIST it is the best criterion without training at 0.032 and "
        "less.",
        options=("scoring_rounds",),
    ),
    ("initializer", "kaiming"): Note(
        "Weights are drawn from a normal distribution whose variance suits ReLU networks.",
        "Use it as the baseline, and for networks whose constructor draws differently.",
        ("1502.01852",),
    ),
    ("initializer", "zero"): Note(
        "The network starts as identities and Hadamard matrices; nothing is drawn.",
        "Use it without a mask at densities down to 0.032, where on MNIST it gains ten points over "
        "one-shot pruning alone. Beside a learnable mask it gains nothing there.",
        (PIPELINE,),
    ),
    ("initializer", "zero_paper"): Note(
        "ZerO as the pipeline's paper prints it, with the two cases the other way round.",
        "Use it to follow the paper to the letter; otherwise prefer `zero`.",
        ("2110.12661",),
    ),
    ("mask", "penalty"): Note(
        "Every weight learns the probability with which it takes part; a penalty on the sum of these "
        "probabilities closes most of them.",
        "Use it at densities of 0.03 and less: it is the best method in the table on MNIST at 0.032, 0.01 "
        "and 0.0032. λ2 decides how far the mask closes, and accuracy is best where the share of M above ½ "
        "after the stage is near the density; so search λ2, its warm-up and the initial value. An initial "
        "value of 0.5 closes the mask at once where λ2 is 3e-4 or more from the first step on, and beside "
        "the initializer `zero`, whose network is a chain of single weights, whatever λ2 is: start at 0.9 "
        "there.",
        options=("lambda1", "lambda2", "lambda2_warmup", "initial", "lr"),
    ),
    ("mask", "target"): Note(
        "The mask of `penalty`, with the expected number of open weights held at the density instead of "
        "pushed down.",
        "Use it where λ2 is not to be tuned. At 0.1 it is as good as a tuned λ2, at 0.01 and less it is "
        "worse and spreads more between seeds. The network is trained for one density, so pre-pruning is not "
        "shared between densities.",
        (PIPELINE,),
        options=("lambda1", "target_warmup", "initial", "lr"),
    ),
    ("mask", "path"): Note(
        "The mask of `penalty`, whose mean follows a path that falls through all densities; a controller "
        "sets λ2, which need not be found.",
        "Use it with `pruning.from_epoch: best` to train one network for every density; no λ2 is searched. "
        "What is left to search is how the path slows down (`power`), how fast the mask is learnt "
        "(`travel`), and the learning rate. A low learning rate is best at the lowest densities, where the "
        "network decays if the stage holds it there for long.",
        options=(
            *("lowest", "factor", "start", "opening", "end", "power", "travel"),
            *("gain", "proportional", "lambda1", "initial"),
        ),
    ),
    ("allocation", "global"): Note(
        "The weights of all layers are ranked together, and the best floor(d·n) stay.",
        "Use it by default: the criterion decides how many weights a layer keeps. At low densities it may "
        "leave a layer with none; the sweep warns where its best network is cut through.",
    ),
    ("allocation", "uniform"): Note(
        "Every layer keeps the same share of its weights.",
        "Use it as a baseline, often with `dense_layers: first`.",
    ),
    ("allocation", "erk"): Note(
        "Small layers keep a larger share of their weights than large ones.",
        "Use it with `random`, `set` and `rigl`, whose scores say nothing of what a layer needs.",
    ),
    ("structure", "channel"): Note(
        "Whole output channels or neurons are pruned.",
        "Use it where the network must run faster without sparse kernels. At the same density it costs more "
        "accuracy than pruning single weights.",
    ),
    ("structure", "n:m"): Note(
        'Of every m consecutive weights n stay: `"2:4"`, `"1:4"` or `"4:8"`.',
        'Use `"2:4"` for GPUs with sparse tensor cores. The pattern fixes the density at n/m.',
    ),
    ("schedule", "one_shot"): Note(
        "All weights go at once, after pre-pruning.",
        "Use it by default. With a learnable mask nothing else is needed.",
        options=(),
    ),
    ("schedule", "iterative"): Note(
        "Prune a little, train again, prune further: after round r of n the density is d^(r/n).",
        "Use it without a mask, where training time does not matter: on MNIST at 0.01 it gives 72 % where "
        "one shot gives 16 %. With `pruning.rewind: init` it is the search for a lottery ticket.",
        ("1506.02626", "1803.03635"),
        options=("rounds", "epochs"),
    ),
    ("schedule", "gradual"): Note(
        "Weights go while post-pruning trains: many at first, fewer towards the end.",
        "Use it where no mask is to be learnt. In the table on MNIST it is second only to the mask, at the "
        "cost of one training.",
        options=("start", "end", "every"),
    ),
    ("dynamic", "rigl"): Note(
        "The mask moves during training: the smallest weights are dropped, and those with the largest dense "
        "gradient grow.",
        "Use it to train a sparse network from the start (`pre_pruning: null`, `criterion: random`, "
        "`allocation: erk`) at densities of 0.03 and more. Below, its random start may be cut through, and "
        "no gradient shows where to grow.",
        ("1911.11134",),
    ),
    ("dynamic", "set"): Note(
        "The mask moves during training: the smallest weights are dropped, and others grow at random.",
        "Use it as `rigl`, without its dense gradients. On MNIST it keeps up with `rigl` at 0.1 and 0.032 "
        "and falls behind at 0.01.",
    ),
    ("rescaling", "rescaled_init"): Note(
        "One scale per weight tensor is learnt before post-pruning, so that the first steps make progress.",
        "Use it on networks pruned at initialization that train slowly. It is a part of ToST. On MNIST it "
        "gains nothing.",
    ),
    ("soft", "label_smoothing"): Note(
        "For the first epochs after pruning, a share α of each label is spread over all classes.",
        "Use it, like the other parts of ToST, where the search has trials to spare: each part can be "
        "switched off alone. On MNIST ToST changes little.",
        ("1512.00567", "2205.15322"),
    ),
    ("soft", "soft_activation"): Note(
        "For the first epochs after pruning every ReLU is a smooth PSwish, which hardens into ReLU.",
        "Use it where many units of a pruned ReLU network are dead. The model needs `nn.ReLU` modules. On "
        "MNIST ToST, of which it is a part, changes little.",
        ("2205.15322",),
    ),
    ("soft", "soft_skip"): Note(
        "For the first epochs after pruning every block has a skip connection, which fades away.",
        "Use it on plain networks, where little signal passes the pruned layers. On MNIST ToST, of which it "
        "is a part, changes little.",
        ("2205.15322",),
    ),
}
"""The figures are those of sweeps/table/README.md."""


def methods() -> Iterator[tuple[str, str, Any]]:
    """(kind, name, object) of every method; the object has the docstring."""
    from prunetune.config import schema
    from prunetune.sparsity import allocation, dynamic, rescaling, smoothing

    for kind, registered in REGISTERED.items():
        if kind != "dynamic":
            yield from ((kind, name, registered.find(name)) for name in registered.names if name != "default")
    for name, counts in allocation.LAYER_COUNTS.items():
        yield "allocation", name, counts or allocation.top_k
    yield "structure", "channel", allocation.channels
    yield "structure", "n:m", allocation.n_of_m
    yield "schedule", "one_shot", schema.PruningScheduleConfig
    yield "schedule", "iterative", schema.PruningScheduleConfig
    yield "schedule", "gradual", dynamic.cubic_density
    for name in REGISTERED["dynamic"].names:
        yield "dynamic", name, REGISTERED["dynamic"].find(name)
    yield "rescaling", "rescaled_init", rescaling.rescale
    yield "soft", "label_smoothing", schema.LabelSmoothingConfig
    yield "soft", "soft_activation", smoothing.pswish
    yield "soft", "soft_skip", smoothing.softened


_NAMES = ("name", "method")
"""Keys of a section that name the method itself."""


def options(kind: str, name: str, method: Any) -> list[tuple[str, str, str, str]]:
    """(dotted key, default, rule, meaning) of a method's options.

    They are the fields of the method's section in a sweep file; of a registered method its own, too.
    """
    note, described = NOTES.get((kind, name)), KINDS[kind]
    section = described.section.format(name=name)
    fields = {}
    if section:
        fields = {key: field for key, field in _section(section).model_fields.items() if key not in _NAMES}
    if kind in REGISTERED:
        fields |= REGISTERED[kind].options(name).model_fields
    if note is not None and note.options is not None:
        wanted: Iterable[str] = note.options
    else:
        wanted = described.options or fields
    follow = getattr(method, "from_densities", {})
    return [
        (
            f"{section}.{key}",
            "from `densities`" if key in follow else _default(fields[key]),
            _rule(fields[key]),
            fields[key].description or "",
        )
        for key in wanted
    ]


def card(kind: str, name: str, method: Any) -> str:
    """One method's page."""
    note = NOTES.get((kind, name), Note("", ""))
    described = KINDS[kind]
    text = _paragraphs(inspect.getdoc(method) or "")
    parts = [f"# {_title(name)}"]
    parts.append(f"{described.title}, `{described.key.format(name=name)}`")
    if note.what:
        parts.append(note.what)
    if note.when:
        parts.append(f"## When\n\n{note.when}")
    parts.append("## How\n\n" + "\n\n".join(text))
    if rows := options(kind, name, method):
        lines = ["## Hyperparameters", "", "| key | default | rule | meaning |", "| --- | --- | --- | --- |"]
        parts.append("\n".join([*lines, *(f"| `{key}` | {a} | {b} | {c} |" for key, a, b, c in rows)]))
    papers = dict.fromkeys([*re.findall(r"arXiv (\d{4}\.\d{5})", inspect.getdoc(method) or ""), *note.papers])
    if re.search(r"\(paper,|paper's", inspect.getdoc(method) or ""):
        papers[PIPELINE] = None
    if papers:
        parts.append("## Papers\n\n" + "\n".join(f"- {_paper(number)}" for number in papers))
    parts.append(f"Code: `{method.__module__}.{method.__qualname__}`")
    return "\n\n".join(parts) + "\n"


def index(found: Iterable[tuple[str, str, Any]]) -> str:
    """The table of all cards."""
    lines = [
        "# Methods",
        "",
        "Every method is an option of the sweep file, searchable like every other value. A card says what",
        "the method does, when to use it, which hyperparameters it has, and whose it is. The cards are",
        "written from the code, by `python docs/cards.py`.",
    ]
    last = None
    for kind, name, _ in found:
        if kind != last:
            lines += ["", f"## {KINDS[kind].title}", "", "| method | in one sentence |", "| --- | --- |"]
            last = kind
        note = NOTES.get((kind, name), Note("", ""))
        lines.append(f"| [{name}]({file_name(kind, name)}) | {note.what} |")
    return "\n".join(lines) + "\n"


def file_name(kind: str, name: str) -> str:
    """Of a method's card."""
    return f"{kind}-{name}.md".replace("_", "-").replace(":", "-of-")


def pages() -> dict[str, str]:
    """Every file of docs/methods/, by name."""
    found = list(methods())
    cards = {file_name(kind, name): card(kind, name, method) for kind, name, method in found}
    return {"index.md": index(found), **cards}


def on_config(config: Any) -> Any:
    """MkDocs' hook: the cards, kind by kind, in the navigation beside the table of them."""
    entries: list[Any] = ["methods/index.md"]
    for kind, described in KINDS.items():
        files = [f"methods/{path.name}" for path in sorted(FOLDER.glob(f"{kind}-*.md"))]
        entries.append({described.title: files})
    config["nav"] = [{"Methods": entries} if "Methods" in entry else entry for entry in config["nav"]]
    return config


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Write docs/methods/ from the code.")
    parser.add_argument("--check", action="store_true", help="only say which files would change")
    given = parser.parse_args(arguments)
    wanted = pages()
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    changed = sorted(name for name in {*wanted, *there} if wanted.get(name) != there.get(name))
    if given.check:
        for name in changed:
            print(f"not what docs/cards.py writes: docs/methods/{name}")
        return 1 if changed else 0
    FOLDER.mkdir(exist_ok=True)
    for name in changed:
        if name in wanted:
            (FOLDER / name).write_text(wanted[name], encoding="utf-8")
        else:
            (FOLDER / name).unlink()
    print(f"{len(wanted)} files, {len(changed)} of them changed")
    return 0


_TITLES = {
    "snip": "SNIP",
    "grasp": "GraSP",
    "synflow": "SynFlow",
    "taylor": "Taylor",
    "zero": "ZerO",
    "zero_paper": "ZerO, as the paper prints it",
    "erk": "ERK",
    "rigl": "RigL",
    "set": "SET",
    "n:m": "n:m patterns",
    "penalty": "Mask with a penalty",
    "target": "Mask with a target",
    "path": "Mask on a path",
    "one_shot": "One-shot pruning",
    "iterative": "Iterative pruning",
    "gradual": "Gradual pruning",
    "global": "Global allocation",
    "uniform": "Uniform allocation",
    "channel": "Channels",
    "random": "Random pruning",
    "rescaled_init": "Layer-wise rescaled initialization",
}


def _title(name: str) -> str:
    return _TITLES.get(name, name.replace("_", " ").capitalize())


def _paper(number: str) -> str:
    link = f"[arXiv {number}](https://arxiv.org/abs/{number})"
    return f"{PAPERS[number]}, {link}" if number in PAPERS else link


def _paragraphs(docstring: str) -> list[str]:
    """A docstring's prose as Markdown: doctests go, double backquotes stay, `*` and `_` are letters."""
    found = [p for p in re.split(r"\n\s*\n", docstring) if not p.lstrip().startswith(">>>")]
    return [
        "".join(
            piece if i % 2 else re.sub(r"([*_<|])", r"\\\1", piece)
            for i, piece in enumerate(re.split(r"(`[^`]*`)", paragraph))
        )
        for paragraph in found
    ]


def _section(dotted: str) -> type[BaseModel]:
    """The model behind a section of the sweep file."""
    from prunetune.config.schema import Config

    model: type[BaseModel] = Config
    for part in dotted.split("."):
        model = next(iter(_models(model.model_fields[part].annotation)))
    return model


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models(argument)


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else _shown(field.default)


def _shown(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    return "`null`" if value is None else f"`{value}`"


def _rule(field: FieldInfo) -> str:
    """The bounds of a number, or the words allowed."""
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    bounds = [
        f"{sign} {getattr(rule, name):g}"
        for rule in field.metadata
        for name, sign in signs.items()
        if getattr(rule, name, None) is not None
    ]
    words = [f"`{word}`" for word in getattr(field.annotation, "__args__", ()) if isinstance(word, str)]
    return ", ".join(bounds or words)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main(sys.argv[1:]))
