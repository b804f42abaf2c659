"""Parameters that say how strongly a mechanism or a label protection protects."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PolicyBound:
    """Rule of an owner's policy that bounds a level.

    Several mechanisms with one kind of level share one bound.

    Attributes:
        rule: table and key in the policy file, such as ``noise.max_eta``.
        says: sentence about the rule; ``{bound:g}`` stands for the policy's number.
        absent: sentence about what its absence allows.
        least: whether the rule bounds the level from below; otherwise from above.
    """

    rule: str
    says: str
    absent: str
    least: bool = False


@dataclass(frozen=True)
class Level:
    """Strength of a protection: a setting of the run and a parameter of what is built from it.

    Attributes:
        setting: name of the setting in its group and of the parameter.
        unit: unit of the setting, in words.
        total: unit in which fresh draws add up in the ledger; empty where draws do not add up.
        bound: how a policy bounds the level; None where no rule does.
    """

    setting: str
    unit: str
    total: str = ""
    bound: PolicyBound | None = None

    @property
    def key(self) -> str:
        """Name of the setting as the flat run config has it, without its group."""
        return self.setting.replace("_", "-")
