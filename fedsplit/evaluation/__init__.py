"""How good a model is: perplexity of a text, and multiple choice by likelihood.

Layer 2: it takes a live model and a tokenizer, whatever they came from (a base, an emulator, a
plugged-in model), and knows nothing of any of these.

| module | what it does |
| --- | --- |
| :mod:`~fedsplit.evaluation.perplexity` | nats a token of a long text, interval over blocks |
| :mod:`~fedsplit.evaluation.likelihood` | continuations scored in batches behind cached prefixes |
| :mod:`~fedsplit.evaluation.task_files` | task files that are data and nothing else |
| :mod:`~fedsplit.evaluation.harness` | lm-evaluation-harness over both (extra ``evaluate``) |
"""
