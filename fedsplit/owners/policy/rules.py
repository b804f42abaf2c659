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

import os
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedsplit.errors import ConfigError, PolicyError, check
from fedsplit.owners.policy.rule_table import policy_rules
from fedsplit.privacy.labels.table import LABEL_PROTECTIONS, said
from fedsplit.privacy.levels import Level
from fedsplit.privacy.mechanisms.table import MECHANISMS, strength_bounds
from fedsplit.tasks import task_type

POLICY_FILE = "owner.toml"
_MAX_BYTES = 1 << 16


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
    """Facts about a run that are known before the owner connects.

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
        rules = policy_rules()
        names = sorted({name.partition(".")[0] for name in rules})
        for table, content in tables.items():
            check(table in names, table, content, "a table named " + ", ".join(names))
            check(isinstance(content, dict), table, content, f"a table: [{table}]")
            for key, value in content.items():
                name = f"{table}.{key}"
                known = ", ".join(x.partition(".")[2] for x in rules if x.startswith(f"{table}."))
                check(name in rules, name, value, f"a known rule; [{table}] has {known}")
                self.rules[name] = rules[name].parse(name, value)
        begin, end = self.rules.get("valid.not_before"), self.rules.get("valid.not_after")
        if begin and end:
            check(begin < end, "valid.not_after", str(end), f"after valid.not_before ({begin})")
        floor = "measure.min_empirical_privacy"
        if self.rules.get(floor):  # noises without end average away
            bound = "with budget.views_total, which bounds the noises that can be averaged"
            check("budget.views_total" in self.rules, floor, self.rules[floor], bound)

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
            tables = tomllib.loads(content.decode("utf-8-sig"))
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
            self.most("model.max_tokens", flat["model.max-tokens"]),
            self.most("budget.rounds", asked.round),
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
        if flat.get("strategy") == "offsite-tuning" and not flat["dp.noise-multiplier"]:
            found.append(self.least("offsite.min_owners", flat["train.min-owners"]))
            if self.rules.get("offsite.require_dp"):
                found.append(Breach("offsite.require_dp", "exact updates", "DP-SGD (dp.*)"))
        joint = flat.get("strategy") == "split-tuning" and flat["split.bottom"] == "joint"
        leaves = joint or flat.get("strategy") == "offsite-tuning"
        if leaves and not flat.get("secure.aggregation", False):
            found += self.unmasked("an update that the server can read")
        stream = (asked.transport or flat["session.transport"]) == "stream"
        if self.rules.get("transport.own_ca") and stream and not asked.own_ca:
            bound = "one whose certificate authority this owner's node config names (session-ca)"
            found.append(Breach("transport.own_ca", "a stream", bound))
        pinned = self.rules.get("app.digest")
        if pinned and asked.app_digest is not None and asked.app_digest != pinned:
            shown = asked.app_digest or "an app whose files are not visible here"
            found.append(Breach("app.digest", shown, pinned))
        return [breach for breach in found if breach is not None]

    def unmasked(self, asked: str) -> list[Breach]:
        """Return the breach that weights are which leave otherwise than in a masked sum."""
        rule = "offsite.require_secure_aggregation"
        return [Breach(rule, asked, "secure.aggregation = true")] if rule in self else []

    def _adapters_only(self, flat: Mapping[str, Any]) -> bool:
        """Return whether adapters alone leave and the owner's policy names that strategy.

        Rules about representations have nothing to bound there.  A policy that does not name the
        strategy keeps them, and so refuses what it was not written for.
        """
        name = "offsite-tuning"
        return flat.get("strategy") == name and name in self.rules.get("app.strategies", ())

    def _representations(self, flat: Mapping[str, Any]) -> list[Breach | None]:
        """Judge what leaves of texts and labels."""
        found = [
            self._among("model.bottom", flat["split.bottom"]),
            self.least("model.min_k", flat["split.k"]),
            *self._labels(flat),
            *self._noise(str(flat["privacy.mechanism"]), _parameters(flat)),
            *self._clip_settings(flat),
            *self._cti_settings(flat),
        ]
        ratio = float(flat.get("privacy.noise-ratio", 0.0))
        return [*found, self.least("noise.min_ratio", ratio)] if ratio else found

    def _labels(self, flat: Mapping[str, Any]) -> list[Breach | None]:
        asked = said(str(flat.get("labels.protection", "none")))
        parts = asked.split("+")  # two protections together are no weaker than each of them
        allowed = self.rules.get("labels.protection", ())
        found: list[Breach | None] = []
        if not set(parts) & set(allowed):
            found.append(self._among("labels.protection", asked))
        for part in self.rules.get("labels.require", ()):
            if part not in parts:
                found.append(Breach("labels.require", asked, f"one with {part}"))
        if task_type(str(flat["model.task"])).named:
            found.append(self._exactly("labels.classes", flat["model.labels"]))
        for part in parts:
            protection = LABEL_PROTECTIONS.get(part)
            if protection is not None and protection.changes_labels():
                found.append(self._exactly("labels.epsilon", float(flat["labels.epsilon"])))
            if protection is not None and protection.level is not None:
                value = flat.get(f"labels.{protection.level.key}", float("nan"))
                found.append(self._level(protection.level, float(value)))
        return found

    def _announced(self, flat: Mapping[str, Any]) -> list[Breach | None]:
        """Judge the amounts that a run announces; what it really takes is counted beside this."""
        rounds = int(flat["train.rounds"])
        found = [self.most("budget.rounds", rounds)]
        if flat["train.max-steps"]:  # then the number of epochs depends on the owner's data
            return found
        epochs = rounds * int(flat["train.epochs"])
        rules = ["budget.epochs_per_run", "budget.epochs_per_bottom"]
        if flat["split.bottom"] == "joint":
            rules += ["budget.views_per_bottom", "budget.views_total"]
        return found + [self.most(rule, epochs) for rule in rules]

    def _clip_settings(self, flat: Mapping[str, Any]) -> list[Breach | None]:
        """Judge the norm that rows are to be clipped to, as far as the settings say it."""
        asked = str(flat.get("privacy.row-clip", "off"))
        if asked == "auto" or not _protects(str(flat["privacy.mechanism"])):
            return []
        if asked != "off" and "noise.max_clip" in self:
            return [self.most("noise.max_clip", float(asked))]
        if not self.rules.get("noise.require_clip"):
            return []
        bound = "auto" + (", or a number that noise.max_clip bounds" if asked != "off" else "")
        return [Breach("noise.require_clip", f"privacy.row-clip={asked}", bound)]

    def _cti_settings(self, flat: Mapping[str, Any]) -> list[Breach | None]:
        if flat["privacy.cti"] == "off" or not _protects(str(flat["privacy.mechanism"])):
            return []
        return [
            self.most("cti.max_share", flat["privacy.cti-max-share"]),
            self.least("cti.min_rho", flat["privacy.cti-rho"]),
        ]

    # ---- what the mechanism decides ---------------------------------------------------------

    def _noise(self, name: str, parameters: Mapping[str, Any]) -> list[Breach | None]:
        """Return what is wrong with a mechanism; parameters that are not known yet are left out."""
        found = [self._among("noise.mechanisms", name)]
        bounded = [rule for rule in sorted(strength_bounds()) if rule in self]
        if not _protects(name):
            rules = bounded + ["noise.min_ratio"] * ("noise.min_ratio" in self)
            return found + [Breach(rule, "no noise", self._demand(rule)) for rule in rules]
        level = MECHANISMS[name].level if name in MECHANISMS else None
        rule = level.bound.rule if level is not None and level.bound is not None else ""
        if level is not None and rule in self and level.setting in parameters:
            found.append(self._level(level, float(parameters[level.setting])))
        elif bounded and rule not in self:  # another mechanism must be no way around a bound
            need = rule or "a mechanism that this version can judge"
            found += [
                Breach(x, f"mechanism {name}", f"a mechanism it bounds (set {need} too)")
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
        if _protects(mechanism):
            clip = float(parameters.get("row_clip", 0.0))
            if self.rules.get("noise.require_clip") and not clip:
                found.append(Breach("noise.require_clip", "no clipping", "a norm C"))
            found.append(self.most("noise.max_clip", clip))
        if "noise.min_ratio" in self and _protects(mechanism):
            if ratio is None:
                bound = "one whose noise can be measured"
                found.append(Breach("noise.min_ratio", f"mechanism {mechanism}", bound))
            else:
                # eta is rounded to 4 digits: a run that asks for exactly the bound must pass.
                rounded = max(ratio, min(self["noise.min_ratio"], ratio * 1.001))
                found.append(self.least("noise.min_ratio", rounded))
        return [breach for breach in found if breach is not None]

    # ---- one rule ---------------------------------------------------------------------------

    def _level(self, level: Level, value: float) -> Breach | None:
        if level.bound is None:
            return None
        judge = self.least if level.bound.least else self.most
        return judge(level.bound.rule, value)

    def _demand(self, rule: str) -> str:
        bound = strength_bounds().get(rule)
        least = rule == "noise.min_ratio" if bound is None else bound.least
        return f"{'>=' if least else '<='} {self[rule]:g}"

    def most(self, rule: str, value: float) -> Breach | None:
        """Return the breach of a rule that bounds ``value`` from above, if it is one."""
        ok = rule not in self or value <= self[rule]  # NaN is not
        return None if ok else Breach(rule, value, f"<= {self[rule]:g}")

    def least(self, rule: str, value: float) -> Breach | None:
        """Return the breach of a rule that bounds ``value`` from below, if it is one."""
        ok = rule not in self or value >= self[rule]
        return None if ok else Breach(rule, value, f">= {self[rule]:g}")

    def _exactly(self, rule: str, value: float) -> Breach | None:
        ok = rule not in self or value == self[rule]
        return None if ok else Breach(rule, value, f"exactly {self[rule]:g}")

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


def refuse(breaches: list[Breach]) -> None:
    """Refuse a run that breaks a rule.

    Raises:
        PolicyError: names each rule, its bound and what was asked.
    """
    if breaches:
        told = "; ".join(str(breach) for breach in breaches)
        raise PolicyError(
            f"owner's policy: {told}", tuple(dict.fromkeys(breach.rule for breach in breaches))
        )


def _protects(mechanism: str) -> bool:
    """Return whether a mechanism changes what leaves; one that is not known here may."""
    return mechanism not in MECHANISMS or MECHANISMS[mechanism].protects()


def _parameters(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the levels that the settings fix; 0 means "through the ratio"."""
    levels = [m.level for m in MECHANISMS.values() if m.level is not None]
    asked = {level.setting: flat.get(f"privacy.{level.key}", 0) for level in levels}
    return {setting: value for setting, value in asked.items() if value}
