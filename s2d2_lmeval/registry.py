"""Registries of the extensible parts by name: decoders, policies, estimators, strategies, families.

A part registers itself at its definition (``@DECODERS.register("mine", …)``). Registries are filled on first use: from
this package, then from installed packages that name a module (or a part) under an entry point group such as
``s2d2_lmeval.decoders``. So this module does not import what it lists.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from s2d2_lmeval.errors import ConfigError

PartT = TypeVar("PartT")
ImplementationT = TypeVar("ImplementationT")

logger = logging.getLogger("s2d2_lmeval")


@dataclass(frozen=True)
class Entry:
    """The declared properties of a part.

    Attributes:
        name: the name that users write.
        implementation: the class or function.
        schemes: the family schemes it supports (:attr:`s2d2_lmeval.families.Facts.scheme`); ``("",)``: any.
        options: its own options classes (:func:`~s2d2_lmeval.decoding.options.option.option`).
    """

    name: str
    implementation: Any
    schemes: tuple[str, ...] = ("",)
    options: tuple[type, ...] = ()


@dataclass(frozen=True)
class DecoderEntry(Entry):
    """The declared properties of a decoder. Several classes may share a name, each for other schemes.

    Attributes:
        promise: the guarantee on its output, in one sentence.
        imposes: options that have a fixed value with this decoder.
        acceptances: supported values of the option ``acceptance``, the default first.
        strategy: the remasking strategy, if it is fixed.
        needs_drafter: whether it needs a separate drafter.
        accelerates: whether it runs the steps of another decoder, ``base``.
        plain: whether it denoises without speculation, by its own definition: others are compared with it, and may
            run its steps.
        unfit: scheme -> why it does not fit, if one might expect that it does.
    """

    promise: str = ""
    imposes: Mapping[str, Any] = field(default_factory=dict)
    acceptances: tuple[str, ...] = ()
    strategy: str | None = None
    needs_drafter: bool = False
    accelerates: bool = False
    plain: bool = False
    unfit: Mapping[str, str] = field(default_factory=dict)


class Registry(Mapping[str, PartT], Generic[PartT]):
    """The parts of one ``kind``, such as ``"decoders"``, in the order in which messages and pages list them.

    Args:
        kind: names the entry point group ``s2d2_lmeval.<kind>``.
        modules: modules of this package whose import registers its parts.
    """

    def __init__(self, kind: str, *modules: str) -> None:
        self.kind = kind
        self.modules = modules
        self._parts: dict[tuple[str, str], PartT] = {}
        self._filled = False

    def add(self, name: str, part: PartT, schemes: tuple[str, ...] = ("",)) -> None:
        """Register ``part`` under ``name``. Running the same definition again replaces it.

        Raises:
            ConfigError: the name is another part's.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{name!r} cannot name one of the {self.kind}; give a name, such as 'mine'.")
        if self.modules and _defined_in(part)[0] not in self.modules:
            self._filled_parts()  # an outside part must not take a name before its owner is registered
        for scheme in schemes:
            other = self._parts.get((name, scheme))
            if other is not None and _defined_in(other) != _defined_in(part):
                raise ConfigError(f"{name} is the name of one of the {self.kind} already; choose another.")
        parts = self._parts | dict.fromkeys([(name, scheme) for scheme in schemes], part)
        # Whatever the import order, parts are in the order of the modules, and within one in source order.
        places = {module: place for place, module in enumerate(self.modules)}
        order = sorted(parts, key=lambda key: places.get(_defined_in(parts[key])[0], len(places)))
        self._parts = {key: parts[key] for key in order}

    def remove(self, name: str) -> None:
        """Forget the parts of that name."""
        self._parts = {key: part for key, part in self._parts.items() if key[0] != name}

    def known(self) -> list[PartT]:
        """The parts registered so far, without importing more."""
        return list(self._parts.values())

    def find(self, name: str, scheme: str) -> PartT | None:
        """The part of that name for that scheme, or for any."""
        parts = self._filled_parts()
        return parts.get((name, scheme)) or parts.get((name, ""))

    def all(self, name: str) -> list[PartT]:
        """The parts of that name, whatever their scheme."""
        return [part for (own, _), part in self._filled_parts().items() if own == name]

    def names(self, scheme: str) -> list[str]:
        """The names of the parts for a scheme."""
        return [name for name in self if (name, scheme) in self._parts]

    def __getitem__(self, name: str) -> PartT:
        for part in self.all(name):
            return part
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for name, _ in self._filled_parts()))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _filled_parts(self) -> dict[tuple[str, str], PartT]:
        if not self._filled:
            self._filled = True  # now: what is imported registers itself, and must not begin anew
            try:
                for module in self.modules:
                    import_module(module)
            except BaseException:
                self._filled = False  # half a registry would refuse what it should know
                raise
            for point in entry_points(group=f"s2d2_lmeval.{self.kind}"):
                _load(point)
        return self._parts


def _load(point: EntryPoint) -> None:
    """Import what another package names: a module, or a part of it. It registers itself by being imported."""
    try:
        point.load()
    except Exception as error:
        # A broken outside package must not stop everything else; its names are refused as unknown.
        logger.warning("%s = %s (%s) is left out: %s", point.name, point.value, point.group, error)


class Registrar(Registry[Any]):
    """A registry of classes or functions that declare their properties when they register."""

    def __init__(self, kind: str, *modules: str, entry: type[Entry] = Entry) -> None:
        super().__init__(kind, *modules)
        self._entry = entry

    def register(self, name: str, *schemes: str, **statement: Any) -> Callable[[ImplementationT], ImplementationT]:
        """Decorator that declares properties (:class:`Entry`, :class:`DecoderEntry`). If the name already exists for
        other schemes, omitted properties are copied from there.

        Raises:
            ConfigError: the name is another part's.
        """

        def decorate(implementation: ImplementationT) -> ImplementationT:
            same = next((part for (own, _), part in self._parts.items() if own == name), None)
            said = {**(vars(same) if same is not None and schemes else {}), **statement}
            said |= {"name": name, "implementation": implementation, "schemes": schemes or ("",)}
            try:
                entry = self._entry(**said)
            except TypeError as error:
                raise ConfigError(f"{name} cannot be one of the {self.kind}: {error}.") from None
            self.add(name, entry, entry.schemes)
            return implementation

        return decorate


def _defined_in(part: Any) -> tuple[str, str]:
    """Module and name of a part's definition."""
    source = getattr(part, "implementation", part)
    return getattr(source, "__module__", ""), getattr(source, "__qualname__", repr(source))


_DECODING = "s2d2_lmeval.decoding"

DECODERS = Registrar(
    "decoders",
    *(
        f"{_DECODING}.{module}"
        for module in (
            *("blocks.s2d2", "pipelined.denoising", "rounds.sliding", "spiffy.decoder", "blocks.editing"),
            *("blocks.denoising", "rounds.ddtree", "rounds.dflash", "rounds.target"),
            *("blocks.subblocks", "pipelined.s2d2", "windows.linear", "windows.strided", "windows.reordered"),
        )
    ),
    entry=DecoderEntry,
)
"""Subclasses of :class:`~s2d2_lmeval.decoding.decoder.Decoder`; the first that fits a family is its default."""

POLICIES = Registrar("policies", f"{_DECODING}.routing.policies")
"""When S2D2 verifies: subclasses of :class:`~s2d2_lmeval.decoding.routing.policies.RoutingPolicy`."""

ESTIMATORS = Registrar("estimators", f"{_DECODING}.routing.estimators")
"""How likely a verifier accepts a token: functions as in :mod:`s2d2_lmeval.decoding.routing.estimators`."""

STRATEGIES = Registrar("strategies", f"{_DECODING}.blocks.remasking")
"""Which masks a step decides: functions as in :mod:`s2d2_lmeval.decoding.blocks.remasking`."""

register_decoder = DECODERS.register
"""Decorates a subclass of :class:`~s2d2_lmeval.decoding.decoder.Decoder`: ``@register_decoder("mine", "block", …)``."""
