"""The owner's own rules: what it lets out, whatever a server asks for.

A policy is a TOML file on the owner's machine.  Every rule is optional and bounds one thing; what
no rule bounds is allowed.  It is named by the owner's node config or the machine's environment and
never by the run config, which the server writes, so no setting of a run can weaken it.

Rules are checked at the earliest moment that decides them: those that the run's settings decide
before the owner connects, those about the bottom once it is here and before any representation is
sent, those about amounts line by line with the ledger (see
:mod:`fedsplit.owners.ledger.disclosure`).
"""

from __future__ import annotations

import math
import os
import re
import stat
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

from fedsplit.errors import ConfigError, PolicyError, check

POLICY_VARIABLE = "FEDSPLIT_POLICY"
POLICY_FILE = "owner.toml"
_MAX_BYTES = 1 << 16
_NAME = re.compile(r"[A-Za-z0-9_.:/+-]{1,200}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
Parse = Callable[[str, object], Any]


def _number(low: float, high: float = math.inf, *, strict: bool = False) -> Parse:
    left, right = "(" if strict else "[", "]" if math.isfinite(high) else ")"
    bound = f"a number in {left}{low:g}, {high:g}{right}"

    def parse(name: str, value: object) -> float:
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        check(ok and abs(value) < 1e300, name, value, bound)  # type: ignore[arg-type]
        number = float(value)  # type: ignore[arg-type]
        within = (low < number if strict else low <= number) and number <= high
        check(math.isfinite(number) and within, name, value, bound)
        return number

    return parse


def _count(low: int) -> Parse:
    def parse(name: str, value: object) -> int:
        ok = isinstance(value, int) and not isinstance(value, bool) and low <= value < 2**63
        check(ok, name, value, f"an integer >= {low}")
        return int(value)  # type: ignore[call-overload, no-any-return]

    return parse


def _names(pattern: re.Pattern[str], what: str, known: tuple[str, ...] = ()) -> Parse:
    def parse(name: str, value: object) -> tuple[str, ...]:
        check(isinstance(value, list) and len(value) > 0, name, value, f"a list of {what}")
        for item in value:  # type: ignore[attr-defined]
            check(isinstance(item, str) and bool(pattern.fullmatch(item)), name, item, what)
            check(not known or item in known, name, item, "one of " + ", ".join(known))
        return tuple(value)  # type: ignore[arg-type]

    return parse


def _flag(name: str, value: object) -> bool:
    check(isinstance(value, bool), name, value, "true or false")
    return bool(value)


def _digest(name: str, value: object) -> str:
    ok = isinstance(value, str) and bool(_DIGEST.fullmatch(value))
    check(ok, name, value, "64 hexadecimal digits (fedsplit policy digest prints them)")
    return str(value)


def _moment(end: bool) -> Parse:
    def parse(name: str, value: object) -> datetime:
        if isinstance(value, datetime):
            check(value.tzinfo is not None, name, str(value), "a time with an offset, such as Z")
            return value.astimezone(UTC)
        check(isinstance(value, date), name, value, "a TOML date or time, such as 2026-12-31")
        assert isinstance(value, date)
        day = datetime.combine(value, time(), UTC)
        return day + timedelta(days=1) if end else day  # "not after" a day means its end

    return parse


STRATEGY_NAMES = ("split-tuning", "serving", "offsite-tuning")
# Table and key of every rule, and what its value must be.  Nothing else may stand in the file.
RULES: dict[str, Parse] = {
    "noise.mechanisms": _names(_NAME, "names of mechanisms"),
    "noise.max_eta": _number(0, strict=True),
    "noise.max_epsilon": _number(0, strict=True),
    "noise.max_nats": _number(0, strict=True),
    "noise.min_ratio": _number(0, strict=True),
    "model.names": _names(_NAME, "names of models"),
    "model.bottoms": _names(_DIGEST, "digests, 64 hexadecimal digits"),
    "model.bottom": _names(_NAME, "frozen, joint", ("frozen", "joint")),
    "model.min_k": _count(0),
    "model.max_tokens": _count(1),
    "labels.protection": _names(_NAME, "names of label protections"),
    "labels.max_epsilon": _number(0, strict=True),
    "cti.max_share": _number(0, 1),
    "cti.min_rho": _number(0, 1),
    "budget.rounds": _count(1),
    "budget.epochs_per_run": _number(0, strict=True),
    "budget.epochs_per_bottom": _number(0, strict=True),
    "budget.views_per_bottom": _count(1),
    "budget.views_total": _count(1),
    "budget.bytes_per_run": _count(1),
    "budget.bytes_total": _count(1),
    "budget.sessions_per_run": _count(1),
    "budget.sessions_per_day": _count(1),
    "transport.allowed": _names(_NAME, "stream, messages", ("stream", "messages")),
    "transport.own_ca": _flag,
    "valid.not_before": _moment(False),
    "valid.not_after": _moment(True),
    "app.digest": _digest,
    "app.strategies": _names(_NAME, ", ".join(STRATEGY_NAMES), STRATEGY_NAMES),
}
# The parameter that says how weak a mechanism's noise is, and the rule that bounds it.
STRENGTH = {
    "dchi": ("eta", "noise.max_eta"),
    "nearest-token": ("eta", "noise.max_eta"),
    "gaussian": ("epsilon", "noise.max_epsilon"),
    "pac": ("budget", "noise.max_nats"),
}
_STRENGTH_RULES = tuple(sorted({rule for _, rule in STRENGTH.values()}))


@dataclass(frozen=True)
class Breach:
    """One rule that a run breaks.

    Attributes:
        rule: table and key.
        asked: what the run asks for.
        bound: what the rule demands.
    """

    rule: str
    asked: object
    bound: str

    def __str__(self) -> str:
        asked = f"{self.asked:.6g}" if isinstance(self.asked, float) else repr(self.asked)
        return f"{self.rule}: asked {asked}, must be {self.bound}"


@dataclass(frozen=True)
class Asked:
    """What is known of a run before the owner connects.

    Attributes:
        flat: the run's settings, flat.
        transport: of the offer; empty = as in the settings.
        bottom: digest of the offered bottom; empty = not known yet.
        round: server round of the offer.
        own_ca: whether the owner's node config names the authority for the session's certificate.
        app_digest: what :func:`fedsplit.owners.app_digest.digest_of_app` found; empty = nothing,
            None = no app of a server runs here (``fedsplit predict``).
    """

    flat: Mapping[str, Any]
    transport: str = ""
    bottom: str = ""
    round: int = 1
    own_ca: bool = False
    app_digest: str | None = None


class Policy:
    """An owner's rules.

    Args:
        tables: the content of the TOML file.
        source: where they come from, for logs.

    Raises:
        ConfigError: unknown table or key, wrong type, NaN, infinite or out of range; names it.
    """

    def __init__(self, tables: Mapping[str, Any], source: str = "") -> None:
        self.source = source
        self.rules: dict[str, Any] = {}
        names = sorted({name.partition(".")[0] for name in RULES})
        for table, content in tables.items():
            check(table in names, table, content, "a table named " + ", ".join(names))
            check(isinstance(content, dict), table, content, f"a table: [{table}]")
            for key, value in content.items():
                name = f"{table}.{key}"
                known = ", ".join(x.partition(".")[2] for x in RULES if x.startswith(f"{table}."))
                check(name in RULES, name, value, f"a known rule; [{table}] has {known}")
                self.rules[name] = RULES[name](name, value)
        begin, end = self.rules.get("valid.not_before"), self.rules.get("valid.not_after")
        if begin and end:
            check(begin < end, "valid.not_after", str(end), f"after valid.not_before ({begin})")

    def __contains__(self, rule: str) -> bool:
        return rule in self.rules

    def __getitem__(self, rule: str) -> Any:
        return self.rules[rule]

    @classmethod
    def load(cls, path: Path) -> Policy:
        """Read a policy file.

        Raises:
            ConfigError: not a regular file of this user that nobody else can write, not TOML, or
                not a policy.
        """
        try:
            fd = os.open(path, os.O_RDONLY)
            with os.fdopen(fd, "rb") as file:
                info = os.fstat(file.fileno())
                content = file.read(_MAX_BYTES + 1) if stat.S_ISREG(info.st_mode) else b""
        except OSError as error:
            raise ConfigError(f"policy {path}: must be a readable file: {error}") from None
        mode = stat.S_IMODE(info.st_mode)
        check(stat.S_ISREG(info.st_mode), "policy", str(path), "a regular file")
        check(
            not mode & 0o022, f"policy {path}: mode", f"{mode:04o}", "not writable for others: 0600"
        )
        mine = info.st_uid in (0, os.getuid())
        check(mine, f"policy {path}: owner uid", info.st_uid, f"{os.getuid()} or 0")
        check(len(content) <= _MAX_BYTES, f"policy {path}: bytes", info.st_size, f"<= {_MAX_BYTES}")
        return cls.parse(content, str(path))

    @classmethod
    def parse(cls, content: bytes, source: str = "") -> Policy:
        """Return the policy of a TOML text.

        Raises:
            ConfigError: as :meth:`load`.
        """
        try:
            tables = tomllib.loads(content.decode())
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"policy {source}: must be TOML: {error}") from None
        return cls(tables, source)

    # ---- what settings alone decide ---------------------------------------------------------

    def settings_breaches(self, asked: Asked, moment: datetime | None = None) -> list[Breach]:
        """Return every rule that the run breaks by its settings and its offer."""
        flat = asked.flat
        found: list[Breach | None] = [
            self._moment(moment or datetime.now(UTC)),
            self._among("app.strategies", flat.get("strategy", "split-tuning")),
            self._among("model.names", flat["model.name"]),
            self._most("model.max_tokens", flat["model.max-tokens"]),
            self._most("budget.rounds", asked.round),
            self._among("transport.allowed", flat["session.transport"]),
        ]
        if not self._adapters_only(flat):
            found += self._representations(flat)
        if asked.transport and asked.transport != flat["session.transport"]:
            found.append(self._among("transport.allowed", asked.transport))
        if asked.bottom:
            found.append(self._among("model.bottoms", asked.bottom))
        if flat.get("strategy") != "serving":
            found += self._announced(flat)
        stream = (asked.transport or flat["session.transport"]) == "stream"
        if self.rules.get("transport.own_ca") and stream and not asked.own_ca:
            bound = "one whose certificate authority this owner's node config names (session-ca)"
            found.append(Breach("transport.own_ca", "a stream", bound))
        pinned = self.rules.get("app.digest")
        if pinned and asked.app_digest is not None and asked.app_digest != pinned:
            shown = asked.app_digest or "an app whose files are not visible here"
            found.append(Breach("app.digest", shown, pinned))
        return [breach for breach in found if breach is not None]

    def _adapters_only(self, flat: Mapping[str, Any]) -> bool:
        """Whether trained adapters leave and no representation does, by the owner's own leave.

        Rules about representations have nothing to bound there.  A policy that does not name the
        strategy keeps them, and so refuses what it was not written for.
        """
        name = "offsite-tuning"
        return flat.get("strategy") == name and name in self.rules.get("app.strategies", ())

    def _representations(self, flat: Mapping[str, Any]) -> list[Breach | None]:
        """Judge what leaves of texts and labels."""
        found = [
            self._among("model.bottom", flat["split.bottom"]),
            self._least("model.min_k", flat["split.k"]),
            *self._labels(flat),
            *self._noise(str(flat["privacy.mechanism"]), _parameters(flat)),
            *self._cti_settings(flat),
        ]
        ratio = float(flat.get("privacy.noise-ratio", 0.0))
        return [*found, self._least("noise.min_ratio", ratio)] if ratio else found

    def _labels(self, flat: Mapping[str, Any]) -> list[Breach | None]:
        asked = str(flat.get("labels.protection", "none"))
        parts = asked.split("+")  # two protections together are no weaker than each of them
        allowed = self.rules.get("labels.protection", ())
        found: list[Breach | None] = []
        if not set(parts) & set(allowed):
            found.append(self._among("labels.protection", asked))
        if "randomised-response" in parts:
            found.append(self._most("labels.max_epsilon", flat.get("labels.epsilon", math.inf)))
        return found

    def _announced(self, flat: Mapping[str, Any]) -> list[Breach | None]:
        """Judge the amounts that a run announces; what it really takes is counted beside this."""
        rounds = int(flat["train.rounds"])
        found = [self._most("budget.rounds", rounds)]
        if flat["train.max-steps"]:  # then the number of epochs depends on the owner's data
            return found
        epochs = rounds * int(flat["train.epochs"])
        rules = ["budget.epochs_per_run", "budget.epochs_per_bottom"]
        if flat["split.bottom"] == "joint":
            rules += ["budget.views_per_bottom", "budget.views_total"]
        return found + [self._most(rule, epochs) for rule in rules]

    def _cti_settings(self, flat: Mapping[str, Any]) -> list[Breach | None]:
        if flat["privacy.cti"] == "off" or flat["privacy.mechanism"] == "none":
            return []
        return [
            self._most("cti.max_share", flat["privacy.cti-max-share"]),
            self._least("cti.min_rho", flat["privacy.cti-rho"]),
        ]

    # ---- what the mechanism decides ---------------------------------------------------------

    def _noise(self, mechanism: str, parameters: Mapping[str, Any]) -> list[Breach | None]:
        """Return what is wrong with a mechanism; parameters that are not known yet are left out."""
        found = [self._among("noise.mechanisms", mechanism)]
        bounded = [rule for rule in _STRENGTH_RULES if rule in self]
        if mechanism == "none":
            rules = bounded + ["noise.min_ratio"] * ("noise.min_ratio" in self)
            return found + [Breach(rule, "no noise", _at_most(self, rule)) for rule in rules]
        parameter, rule = STRENGTH.get(mechanism, ("", ""))
        if rule in self and parameter in parameters:
            found.append(self._most(rule, float(parameters[parameter])))
        elif bounded and rule not in self:  # another mechanism must be no way around a bound
            need = rule or "a mechanism that this version can judge"
            found += [
                Breach(x, f"mechanism {mechanism}", f"a mechanism it bounds (set {need} too)")
                for x in bounded
            ]
        return found

    def mechanism_breaches(
        self, mechanism: str, parameters: Mapping[str, Any], ratio: float | None
    ) -> list[Breach]:
        """Return every rule that a mechanism as it was really built breaks.

        Args:
            mechanism: its name.
            parameters: all of its parameters.
            ratio: mean noise over median representation, None = cannot be told.
        """
        found = self._noise(mechanism, parameters)
        if "noise.min_ratio" in self and mechanism != "none":
            if ratio is None:
                bound = "one whose noise can be measured"
                found.append(Breach("noise.min_ratio", f"mechanism {mechanism}", bound))
            else:
                # eta is rounded to 4 digits: a run that asks for exactly the bound must pass.
                rounded = max(ratio, min(self["noise.min_ratio"], ratio * 1.001))
                found.append(self._least("noise.min_ratio", rounded))
        return [breach for breach in found if breach is not None]

    # ---- one rule ---------------------------------------------------------------------------

    def _most(self, rule: str, value: float) -> Breach | None:
        ok = rule not in self or value <= self[rule]  # NaN is not
        return None if ok else Breach(rule, value, f"<= {self[rule]:g}")

    def _least(self, rule: str, value: float) -> Breach | None:
        ok = rule not in self or value >= self[rule]
        return None if ok else Breach(rule, value, f">= {self[rule]:g}")

    def _among(self, rule: str, value: object) -> Breach | None:
        ok = rule not in self or value in self[rule]
        return None if ok else Breach(rule, value, "one of " + ", ".join(self[rule]))

    def _moment(self, moment: datetime) -> Breach | None:
        shown = moment.isoformat(timespec="seconds")
        begin, end = self.rules.get("valid.not_before"), self.rules.get("valid.not_after")
        if begin and moment < begin:
            return Breach("valid.not_before", shown, f"at or after {begin.isoformat()}")
        if end and moment >= end:
            return Breach("valid.not_after", shown, f"before {end.isoformat()}")
        return None

    def most(self, rule: str, value: float) -> None:
        """Refuse ``value`` if it is above a rule's bound.

        Raises:
            PolicyError: names the rule, its bound and the value.
        """
        refuse([b for b in [self._most(rule, value)] if b is not None])


def refuse(breaches: list[Breach]) -> None:
    """Raise if any rule is broken.

    Raises:
        PolicyError: names each rule, its bound and what was asked.
    """
    if breaches:
        raise PolicyError("owner's policy: " + "; ".join(str(breach) for breach in breaches))


def _at_most(policy: Policy, rule: str) -> str:
    return f"{'>=' if rule == 'noise.min_ratio' else '<='} {policy[rule]:g}"


def _parameters(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mechanism's parameters that the settings fix; 0 means "through the ratio"."""
    found = {}
    for parameter, _ in STRENGTH.values():
        value = flat.get(f"privacy.{parameter}", 0)
        if value:
            found[parameter] = value
    return found
