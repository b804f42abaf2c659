"""The public fingerprint file: what an owner shows instead of parameters, signed.

It holds a sketch of the whitened invariants (:mod:`fedsplit.fingerprints.methods.whitened`) of
every
block, the token list that they were seen through, digests, and an Ed25519 signature over all of it
(without a key, a checksum alone: whole, but nobody's).  Anyone with a suspect's weights recomputes
the sketch and compares.  The list should be the public draw for its vocabulary
(:attr:`PublicFingerprint.standard_tokens`): a signer who chose the tokens could forge likeness.

What it reveals: per block and kind of product, ``size`` x ``size`` random linear functionals of a
K x K matrix of rank d (default 32 x 32 numbers against 2 d^2 parameters or more), the token list,
the model's shape and a digest of its weights.  While ``size`` < d each product keeps d^2 - size^2
unknown directions, so weights cannot be rebuilt; and since every rotation of the residual stream
and every inner map gives the same numbers, embeddings and single projections are not determined at
all.  Someone who already holds a candidate model can test it: that is the purpose.

Accuracy: the sketched cosine of one product has a standard error of about 1/size around the exact
one for strangers and less for relatives; the score averages 2 x blocks of them.  Measured on the
gutenberg checkpoints at size 32: within 0.003 for a descendant, 0.022 for the twins.

Source: own construction; random bilinear sketches are Johnson-Lindenstrauss maps.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from torch import Tensor

from fedsplit import storage
from fedsplit.errors import LineageError
from fedsplit.fingerprints.methods.aligned_products import centred_stream
from fedsplit.fingerprints.methods.matching import (
    KINDS,
    BlockMatrices,
    compare_matching_blocks,
    mean_cosine,
    unit,
)
from fedsplit.fingerprints.methods.whitened import orthonormal_rows, whitened_factors
from fedsplit.fingerprints.view import Similarity, WeightView, choose_tokens
from fedsplit.seeding import torch_generator

VERSION = 1
KIND = "fedsplit-fingerprint"
MAX_BYTES = 64 * 1024 * 1024
MOST_TOKENS = 1 << 16  # comparing costs time and memory for each


@dataclass(frozen=True)
class PublicFingerprint:
    """Contents of a fingerprint file.

    Attributes:
        model: a name for people.
        width, depth: of the base.
        tokens: the base's public token list.
        size: side of each sketch.
        seed: of the sketch's random vectors; anyone can draw them again.
        weights: SHA-256 over the base's names, shapes and values.
        sketches: (depth, kinds, size, size) float32.
        vocabulary: token rows of the base that the list was drawn for; 0 = not said.
        signer: hexadecimal public key that signed the file it was read from; empty = nobody.
    """

    model: str
    width: int
    depth: int
    tokens: tuple[int, ...]
    size: int
    seed: int
    weights: str
    sketches: Tensor
    vocabulary: int = 0
    signer: str = ""

    @property
    def standard_tokens(self) -> bool:
        """Whether the list is the public draw for the vocabulary, which nobody could choose."""
        return self.vocabulary > 0 and self.tokens == choose_tokens(self.vocabulary)


def weights_sha256(view: WeightView) -> str:
    """Return the digest of a view's parameters: canonical names, types, shapes, bytes."""
    digest = hashlib.sha256()
    for short, name in sorted(view.canonical().items()):
        tensor = view.get(name).detach().to("cpu").contiguous()
        digest.update(f"{short}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sketch(view: WeightView, tokens: Sequence[int], size: int, seed: int) -> Tensor:
    """Return U^T Y V for each block and kind, (depth, 3, size, size), block by block.

    Raises:
        LineageError: if the view lacks a token of the list.
    """
    x = orthonormal_rows(view.embeddings(tokens), centre=centred_stream(view))
    generator = torch_generator(seed, "public-fingerprint", len(tokens), size)
    u, v = (torch.randn(len(tokens), size, generator=generator) for _ in range(2))
    out = []
    for index in range(view.depth):
        factors = whitened_factors(view, index, x)
        out.append(torch.stack([(u.T @ factors[k][0]) @ (v.T @ factors[k][1]).T for k in KINDS]))
    return torch.stack(out)


def make(
    view: WeightView,
    model: str,
    *,
    tokens: Sequence[int] | None = None,
    size: int = 32,
    seed: int = 2312,
    vocabulary: int | None = None,
) -> PublicFingerprint:
    """Fingerprint a base for publication.

    Args:
        view: the weights.
        model: a name for people.
        tokens: a base's list, to be compared with that base; None for the view's own.
        size: side of the sketches; smaller reveals less and is less accurate.
        seed: of the sketch.
        vocabulary: the one that ``tokens`` was drawn for.

    Raises:
        LineageError: for a size below 4, or one that would give a product away (size >= width).
    """
    if not 4 <= size < view.width:
        raise LineageError(
            f"size={size}: must be in [4, width={view.width}), or the sketch determines products"
        )
    chosen = tuple(tokens) if tokens is not None else choose_tokens(view.vocabulary)
    drawn_for = view.vocabulary if tokens is None else (vocabulary or 0)
    return PublicFingerprint(
        model=model,
        width=view.width,
        depth=view.depth,
        tokens=chosen,
        size=size,
        seed=seed,
        weights=weights_sha256(view),
        sketches=sketch(view, chosen, size, seed),
        vocabulary=drawn_for,
    )


def compare_public(published: PublicFingerprint, suspect: WeightView) -> Similarity:
    """Compare a suspect's weights with a published fingerprint.

    Raises:
        LineageError: if the suspect has another width, or lacks tokens of the list.
    """
    _same_width(published.width, suspect.width)
    theirs = sketch(suspect, published.tokens, published.size, published.seed)
    return compare_sketches(published.sketches, theirs)


def compare_files(base: PublicFingerprint, suspect: PublicFingerprint) -> Similarity:
    """Compare two fingerprint files.

    Raises:
        LineageError: for other widths, or if they were made with other tokens, sizes or seeds.
    """
    _same_width(base.width, suspect.width)
    for name in ("tokens", "size", "seed"):
        ours, theirs = getattr(base, name), getattr(suspect, name)
        if ours != theirs:
            shown = (len(ours), len(theirs)) if name == "tokens" else (ours, theirs)
            raise LineageError(
                f"{name}: the base's file has {shown[0]}, the suspect's {shown[1]}; fingerprints "
                f"made differently cannot be compared"
            )
    return compare_sketches(base.sketches, suspect.sketches)


def _same_width(base: int, suspect: int) -> None:
    if base != suspect:
        raise LineageError(
            f"width={suspect}: the base's is {base}; fingerprints of models of different width "
            f"cannot be compared"
        )


def compare_sketches(ours: Tensor, theirs: Tensor) -> Similarity:
    """Return the cosines of sketches, V/O and FFN averaged over blocks."""

    def of(sketches: Tensor, index: int) -> BlockMatrices:
        return {kind: (unit(sketches[index][n]),) for n, kind in enumerate(KINDS)}

    found = compare_matching_blocks(
        (len(ours), len(theirs)), lambda i: of(ours, i), lambda j: of(theirs, j)
    )
    return Similarity(mean_cosine(found.parts), found.parts, found.per_block)


def _body(fingerprint: PublicFingerprint) -> dict[str, Any]:
    values = fingerprint.sketches.to(torch.float32).contiguous().numpy().astype("<f4").tobytes()
    return {
        "kind": KIND,
        "version": VERSION,
        "model": fingerprint.model,
        "width": fingerprint.width,
        "depth": fingerprint.depth,
        "tokens": list(fingerprint.tokens),
        "size": fingerprint.size,
        "seed": fingerprint.seed,
        "weights": fingerprint.weights,
        "vocabulary": fingerprint.vocabulary,
        "sketches": base64.b64encode(values).decode(),
    }


def canonical_json(body: dict[str, Any]) -> bytes:
    """Return the one byte string of a JSON object: sorted keys, no spaces, no NaN."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def write(fingerprint: PublicFingerprint, path: str | Path, key: Ed25519PrivateKey | None) -> None:
    """Sign and write a fingerprint as one JSON file.

    Args:
        key: None writes an unsigned file: its checksum shows damage, not who made it.

    Raises:
        LineageError: if the file cannot be written.
    """
    body = _body(fingerprint)
    body["signer"] = "" if key is None else key.public_key().public_bytes_raw().hex()
    text = canonical_json(body)
    seal = hashlib.sha256(text).hexdigest() if key is None else key.sign(text).hex()
    document = json.dumps(body | {"signature": seal}, sort_keys=True, indent=1)
    try:
        Path(path).write_text(document + "\n", encoding="utf-8")
    except OSError as error:
        raise LineageError(f"{path}: cannot be written: {error.strerror or error}") from error


def read(path: str | Path, *, signer: str | None = None) -> PublicFingerprint:
    """Read and verify a fingerprint file.

    Args:
        signer: hexadecimal public key that must have signed it; None accepts any, and then the
            signature only says that the file is whole.

    Raises:
        LineageError: for another kind or version, a wrong signer, a broken signature, or damage.
    """
    where = Path(path)
    try:
        document = json.loads(storage.read_bounded(where, MAX_BYTES))
        kind, version = document["kind"], document["version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LineageError(f"{where}: not a fingerprint file: {error!r}") from error
    if kind != KIND or version != VERSION:
        raise LineageError(
            f"{where}: kind={kind!r}, version={version!r}: must be {KIND!r}, {VERSION}"
        )
    try:
        public, signature = document["signer"], bytes.fromhex(document.pop("signature"))
        if signer is not None and public != signer:
            raise LineageError(f"{where}: signed by {public or 'nobody'}, must be {signer}")
        text = canonical_json(document)
        if public:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
            key.verify(signature, text)
        elif signature != hashlib.sha256(text).digest():
            raise LineageError(f"{where}: the checksum does not fit the contents")
        shape = (int(document["depth"]), len(KINDS), int(document["size"]), int(document["size"]))
        raw = bytearray(base64.b64decode(document["sketches"], validate=True))
        tokens = tuple(int(i) for i in document["tokens"])
        if len(tokens) > MOST_TOKENS or len(set(tokens)) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens: must be distinct, <= {MOST_TOKENS} of them")
        sketches = torch.frombuffer(raw, dtype=torch.float32).clone().view(shape)
        return PublicFingerprint(
            model=str(document["model"]),
            width=int(document["width"]),
            depth=shape[0],
            tokens=tokens,
            size=shape[2],
            seed=int(document["seed"]),
            weights=str(document["weights"]),
            sketches=sketches,
            vocabulary=int(document["vocabulary"]),
            signer=str(public),
        )
    except InvalidSignature as error:
        raise LineageError(f"{where}: the signature does not fit the contents") from error
    except (
        KeyError,
        ValueError,
        TypeError,
        RuntimeError,
        AttributeError,
        OverflowError,
        binascii.Error,
    ) as error:
        raise LineageError(f"{where}: damaged fingerprint file: {error!r}") from error
