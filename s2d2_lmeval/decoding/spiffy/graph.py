"""The directed draft graph: which future states of a block are worth drafting (Spiffy, arXiv 2509.18085).

A node is a set of (position rank, vocabulary rank) pairs: "the most confident mask gets its most probable token, the
third most confident its second". Position ranks count the masks of the block's current state in the order in which the
base decoder would decide them, vocabulary ranks the tokens of such a place, both by the distribution that led to the
state. Edges say which states follow which; a state may be reached by several orders of decisions, so it may have
several parents.

A graph is calibrated for one model and one way of decoding. Under another it is still safe: what it drafts is verified.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.families.files import parse_json, read_text

if TYPE_CHECKING:
    from s2d2_lmeval.decoding.options.config import DecodingConfig
    from s2d2_lmeval.families import Facts

FORMAT, VERSION = "s2d2-lmeval draft graph", 1
ROOT = 0
"""Among parents: the current state itself. Nodes count from 1."""

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Node:
    """A state to draft: its ``pairs`` (position rank, vocabulary rank), sorted; its ``parents``, numbers of nodes, or
    :data:`ROOT`.

    ``count`` says how often the base decoder reached it while the graph was calibrated, ``chances`` how often the
    current state had masks enough for it.
    """

    pairs: Pairs
    parents: tuple[int, ...] = (ROOT,)
    count: int = 0
    chances: int = 0

    @property
    def reach(self) -> int:
        """Masks that the current state must have at least."""
        return self.pairs[-1][0] + 1


@dataclass(frozen=True)
class DraftGraph:
    """Nodes in the order in which they were chosen: the first n would be the graph of n nodes.

    ``model`` and ``decoding`` say what it was calibrated for, ``calibration`` on how much.
    """

    nodes: tuple[Node, ...]
    block_length: int
    model: Mapping[str, Any] = field(default_factory=dict, hash=False)
    decoding: Mapping[str, Any] = field(default_factory=dict, hash=False)
    calibration: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, nodes: Iterable[Iterable[tuple[int, int]]], block_length: int) -> DraftGraph:
        """A graph of these sets of pairs, with an edge wherever a set holds another; no counts."""
        sets = [tuple(sorted(pairs)) for pairs in nodes]
        linked = [
            Node(pairs, (ROOT, *(number for number, other in enumerate(sets, 1) if set(other) < set(pairs))))
            for pairs in sets
        ]
        return cls(tuple(linked), block_length)

    @classmethod
    def chain(cls, block_length: int, length: int) -> DraftGraph:
        """The graph that needs no calibration: the best tokens of the 1, 2, …, ``length`` first places."""
        deepest = min(length, block_length)
        return cls.of([[(place, 0) for place in range(depth)] for depth in range(1, deepest + 1)], block_length)

    @property
    def counted(self) -> bool:
        """Whether the graph knows how often its states occur."""
        return all(node.chances for node in self.nodes)

    def differences(self, model: Mapping[str, Any], decoding: Mapping[str, Any]) -> list[str]:
        """In what a run differs from what the graph was calibrated for, in words."""
        here, there = {**model, **decoding}, {**self.model, **self.decoding}
        differ = [name for name in there if name in here and there[name] != here[name]]
        return [f"{name}={here[name]} here, {there[name]} there" for name in differ]

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        nodes = [{**vars(node), "pairs": [*map(list, node.pairs)], "parents": [*node.parents]} for node in self.nodes]
        about = {"model": dict(self.model), "decoding": dict(self.decoding), "block_length": self.block_length}
        calibration = dict(self.calibration)
        return {"format": FORMAT, "version": VERSION, **about, "calibration": calibration, "nodes": nodes}

    def save(self, path: Path) -> None:
        """Write the graph as JSON, a line per node."""
        plain = self.to_dict()
        nodes = ",\n".join("    " + json.dumps(node) for node in plain.pop("nodes"))
        head = json.dumps(plain, indent=2)[:-2]
        path.write_text(f'{head},\n  "nodes": [\n{nodes}\n  ]\n}}\n' if nodes else f'{head},\n  "nodes": []\n}}\n')


def states_at_most(graph: DraftGraph, nodes: int | str) -> int:
    """States that a row may draft at once, if ``nodes`` of ``graph`` are to be drafted (or ``auto``)."""
    return len(graph.nodes) if nodes == "auto" else min(int(nodes), len(graph.nodes))


_DEPENDS_ON = (
    "base denoising_steps confidence_threshold eb_threshold collapse_entropy editing_threshold max_post_steps "
    "num_to_transfer cache_ver draft_ver"
)
_DEPENDS_ON_SAMPLING = "temperature top_k top_p"


def signature(config: DecodingConfig, facts: Facts) -> tuple[dict[str, object], dict[str, object]]:
    """What a draft graph depends on: of the model, and of how the base decoder decodes."""
    known = config.to_dict()
    names = [*_DEPENDS_ON.split(), *(_DEPENDS_ON_SAMPLING.split() if config.sampled else ())]
    decoding = {name: known[name] for name in names if name in known}
    return {"family": facts.family, "vocab_size": facts.vocab_size}, {**decoding, "sampled": config.sampled}


def graph_for(config: DecodingConfig, facts: Facts) -> DraftGraph:
    """The draft graph that the options name; warns where it was calibrated for another model or another decoding."""
    graph = load_graph(config.draft_graph, config.base)
    found = graph.differences(*signature(config, facts))
    if graph.block_length != config.block_length:
        found.append(f"block_length={config.block_length} here, {graph.block_length} there")
    if found:
        warnings.warn(
            f"The draft graph {config.draft_graph} was calibrated for something else ({'; '.join(found)}). The output "
            "is the same, but fewer forwards may be saved: `s2d2-lmeval calibrate` makes a graph of your own.",
            stacklevel=2,
        )
    return graph


def load_graph(source: str, base: str) -> DraftGraph:
    """The draft graph in the file ``source``; of ``default``, the one that comes with the package for decoder ``base``.

    Raises:
        ConfigError: there is no such file, or it is not a draft graph.
    """
    if source == "default":
        # Decoders that decide by a threshold, of whatever kind, behave alike, and so do those of fixed steps.
        like = "static" if base in ("static", "sequential") else "dynamic"
        text = (files("s2d2_lmeval") / "toy" / "draft_graphs" / f"{like}.json").read_text()
    else:
        try:
            text = read_text(Path(source))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"draft_graph={source} cannot be read ({error}). Give a file that `s2d2-lmeval calibrate` wrote, or "
                "draft_graph=default."
            ) from None
    try:
        return parse_graph(text)
    except ConfigError as error:
        raise ConfigError(f"draft_graph={source} {error}") from None


def parse_graph(text: str) -> DraftGraph:
    """The graph that ``text`` (JSON) describes.

    Raises:
        ConfigError: naming what is wrong with it.
    """
    try:
        plain = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"is not valid JSON ({error}). Run `s2d2-lmeval calibrate` again.") from None
    graph_like = isinstance(plain, dict) and plain.get("format") == FORMAT
    _must(graph_like, f'is not a draft graph: it has no "format": "{FORMAT}".')
    version, length, nodes = (plain.get(name) for name in ("version", "block_length", "nodes"))
    _must(
        version == VERSION, f"is of version {version!r}, and this release reads version {VERSION}. Calibrate it again."
    )
    _must(_whole(length, 1), f"has block_length {length!r}, which is not a positive whole number.")
    _must(isinstance(nodes, list), 'has no list of "nodes".')
    about = {name: plain.get(name, {}) for name in ("model", "decoding", "calibration")}
    for name, value in about.items():
        _must(isinstance(value, dict), f"has {name} {value!r}, which is not an object.")
    graph = DraftGraph(tuple(_node(number, entry) for number, entry in enumerate(nodes, 1)), length, **about)
    _check(graph)
    return graph


def _must(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _node(number: int, entry: Any) -> Node:
    _must(isinstance(entry, dict), f"describes node {number} by {entry!r}, not by an object.")
    pairs, parents = entry.get("pairs"), entry.get("parents")
    counts = {name: entry.get(name, 0) for name in ("count", "chances")}
    _must(
        isinstance(pairs, list)
        and len(pairs) > 0
        and all(isinstance(pair, list) and len(pair) == 2 and all(_whole(rank, 0) for rank in pair) for pair in pairs),
        f"has pairs {pairs!r} at node {number}; they are [position rank, vocabulary rank], from 0.",
    )
    _must(
        isinstance(parents, list) and all(_whole(parent, 0) for parent in parents),
        f"has parents {parents!r} at node {number}; they are numbers of nodes, or 0 for the root.",
    )
    whole = all(_whole(value, 0) for value in counts.values())
    _must(whole, f"has count or chances at node {number} that are not whole numbers: {counts}.")
    return Node(tuple(sorted((place, token) for place, token in pairs)), tuple(parents), **counts)


def _check(graph: DraftGraph) -> None:
    """Refuse nodes that do not make a graph.

    Raises:
        ConfigError: naming the node.
    """
    nodes, length = graph.nodes, graph.block_length
    seen: set[Pairs] = set()
    for number, node in enumerate(nodes, 1):
        places = [place for place, _ in node.pairs]
        different = len(set(places)) == len(places) and places[-1] < length
        _must(
            different,
            f"has node {number} with position ranks {places}: they are different, and below the block length {length}.",
        )
        _must(node.pairs not in seen, f"has node {number} twice.")
        seen.add(node.pairs)
        for parent in node.parents:
            grows = parent == ROOT or (parent <= len(nodes) and set(nodes[parent - 1].pairs) < set(node.pairs))
            _must(grows, f"has an edge {parent} -> {number} along which decided places would change.")
    lost = set(range(1, len(nodes) + 1)) - reachable([node.parents for node in nodes])
    _must(not lost, f"has node {min(lost, default=0)} that no path leads to from the current state.")


def reachable(parents: Sequence[Sequence[int]]) -> set[int]:
    """Numbers of the nodes, given by their ``parents``, that a path leads to from the root."""
    below: dict[int, list[int]] = {}
    for number, above in enumerate(parents, 1):
        for parent in above:
            below.setdefault(parent, []).append(number)
    reached, left = {ROOT}, [ROOT]
    while left:
        for number in below.get(left.pop(), ()):
            if number not in reached:
                reached.add(number)
                left.append(number)
    return reached - {ROOT}
