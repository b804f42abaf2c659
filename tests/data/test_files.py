"""Local files: formats, splits, and where a malformed line is."""

from __future__ import annotations

import json
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.data import files, load_dataset, load_splits, partition
from fedsplit.errors import ConfigError, DataError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
ROWS = [
    {"text": "a fine film", "label": "good", "age": 30},
    {"text": 'dull, "very" dull', "label": "bad", "age": None},
    {"text": "two\nlines", "label": "good", "age": 41},
]


def write_json_lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, delimiter: str = ",") -> Path:
    lines = [
        ["text", "label", "age"],
        ["a fine film", "good", "30"],
        ['"dull, ""very"" dull"', "bad", ""],
        ['"two\nlines"', "good", "41"],
    ]
    path.write_text("\n".join(delimiter.join(line) for line in lines), encoding="utf-8-sig")
    return path


def test_formats_agree(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ROWS)
    paths = [
        write_json_lines(tmp_path / "a.jsonl", ROWS),
        write_csv(tmp_path / "a.csv"),
        write_csv(tmp_path / "a.tsv", "\t"),
        tmp_path / "a.parquet",
    ]
    loaded = [load_dataset("file", path=str(path)) for path in paths]
    assert len({dataset.digest for dataset in loaded}) == 1
    assert loaded[0].texts == tuple(row["text"] for row in ROWS)
    assert loaded[0].label_names == ("bad", "good")
    assert loaded[0].labels == (1, 0, 1)
    ages = [load_dataset("file", path=str(path), columns=["age"]).columns["age"] for path in paths]
    assert ages == [(30, None, 41), ("30", None, "41"), ("30", None, "41"), (30, None, 41)]


def test_folder_of_splits_shares_label_names(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "train.jsonl", ROWS)
    write_json_lines(tmp_path / "dev.jsonl", [{"text": "x", "label": "good"}])
    write_json_lines(tmp_path / "test.jsonl", [{"text": "x", "label": "awful"}])
    (tmp_path / "README.md").write_text("not data")
    train, dev = load_splits("file", path=str(tmp_path), test_split="dev")
    assert dev is not None
    assert train.label_names == dev.label_names == ("awful", "bad", "good")
    assert dev.labels == (2,)
    assert load_dataset("file", path=str(tmp_path), split="dev").labels == (2,)
    assert load_splits("file", path=str(tmp_path))[1].texts == ("x",)  # type: ignore[union-attr]
    with pytest.raises(DataError, match="split='val': must be one of train, dev, test"):
        load_dataset("file", path=str(tmp_path), split="val")


def test_shards_of_a_split_come_in_order(tmp_path: Path) -> None:
    for shard in (1, 0):
        write_json_lines(tmp_path / f"train-0000{shard}-of-00002.jsonl", [ROWS[shard]])
    dataset = load_dataset("file", path=str(tmp_path))
    assert dataset.texts == (ROWS[0]["text"], ROWS[1]["text"])
    assert not dataset.columns
    write_csv(tmp_path / "train.csv")
    with pytest.raises(DataError, match="several formats"):
        load_dataset("file", path=str(tmp_path))


def test_folder_without_splits_has_a_source_for_each_row(tmp_path: Path) -> None:
    (tmp_path / "bronte.txt").write_text("one two three\nfour five\n\nsix\n")
    (tmp_path / "darwin.txt").write_text("seven eight\n")
    dataset = load_dataset("file", path=str(tmp_path), label_column="", passage_words=4)
    assert dataset.texts == ("one two three\nfour five", "six", "seven eight")
    assert dataset.columns == {"source": ("bronte", "bronte", "darwin")}
    asked = {"label_column": "", "passage_words": 4, "columns": ("source",)}
    assert load_dataset("file", path=str(tmp_path), **asked).columns == dataset.columns
    pytest.importorskip("flwr_datasets")
    parts = partition(dataset, 2, "column", seed=0, column="source")
    assert [part.tolist() for part in parts] == [[0, 1], [2]]


@given(st.lists(st.text("ab \n", max_size=40), max_size=12), st.integers(1, 7))
def test_passages_keep_every_word(blocks: list[str], words: int) -> None:
    lines = "".join(blocks).splitlines(keepends=True)
    found = list(files.passages(lines, words))
    assert " ".join(found).split() == " ".join(lines).split()
    sizes = [len(passage.split()) for passage in found]
    assert all(words <= size <= 2 * words - 1 for size in sizes[:-1])
    assert all(0 < size <= 2 * words - 1 for size in sizes)


def test_limit_is_a_reproducible_draw_in_order(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": f"t{i:03}", "label": i % 2} for i in range(200)]
    path = str(write_json_lines(tmp_path / "a.jsonl", rows))
    first, same, other = (load_dataset("file", path=path, limit=20, seed=s) for s in (0, 0, 1))
    assert len(first) == 20
    assert first.digest == same.digest != other.digest
    assert list(first.texts) == sorted(first.texts)
    assert len(load_dataset("file", path=path, limit=1000)) == 200


def test_language_modelling_drops_blank_rows(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "x"}, {"text": " "}, {"text": "y"}])
    dataset = load_dataset("file", path=str(path), label_column="")
    assert dataset.texts == ("x", "y")
    assert dataset.labels == ()


def write_parquet(path: Path, rows: list[dict[str, object]]) -> Path:
    arrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_file_is_an_owner_where_it_is_asked_for_by_name(tmp_path: Path, suffix: str) -> None:
    for name in ("bronte", "darwin"):
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "csv":
            write_csv(path)
        else:
            {"jsonl": write_json_lines, "parquet": write_parquet}[suffix](path, ROWS)
    dataset = load_dataset("file", path=str(tmp_path), columns=("source",))
    assert dataset.columns["source"] == ("bronte",) * 3 + ("darwin",) * 3


def test_an_empty_cell_is_the_same_in_every_format(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": "x", "who": "a"}, {"text": None, "who": None}]
    (tmp_path / "a.csv").write_text('text,who\nx,a\n" ",\n')
    paths = [
        write_json_lines(tmp_path / "a.jsonl", rows),
        write_parquet(tmp_path / "a.parquet", rows),
        tmp_path / "a.csv",
    ]
    for path in paths:
        data = load_dataset("file", path=str(path), label_column="", columns=["who"])
        assert (data.texts, data.columns["who"]) == (("x",), ("a",))  # a blank row is no text
        with pytest.raises(DataError, match=r":(row )?[23]: label=None: .*cell is empty"):
            load_dataset("file", path=str(path), label_column="who")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x", "label": 1}\n{"text": \n', r"a.jsonl:2: must be one JSON obj"),
        ("a.jsonl", b"\n[1, 2]\n", r"a.jsonl:2: list: must be a JSON object"),
        ("a.jsonl", b'{"text": "x", "label": NaN}', r"a.jsonl:1: .*NaN is not JSON"),
        ("a.jsonl", b"[" * 200_000, r"a.jsonl:1: must be one JSON object"),
        ("a.jsonl", b'{"text": "x"}', r"a.jsonl:1: column='label': is missing; found: text"),
        ("a.jsonl", b'{"text": 3, "label": 1}', r"a.jsonl:1: text=3: must be a text"),
        (
            "a.jsonl",
            b'{"text": "x", "label": null}',
            r"a.jsonl:1: label=None: .* cell is empty",
        ),
        ("a.jsonl", b'{"text": "x", "label": [1]}', r"a.jsonl:1: label=\[1\]: must be a string"),
        ("a.jsonl", b'{"text": "", "label": 1}', r"a.jsonl:1: text=''"),
        ("a.jsonl", b'{"text": "\\ud800", "label": 1}', r"a.jsonl:1: text has the lone surrogate"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}', r"a.jsonl:1: column='label'"),
        ("a.jsonl", b'{"text": "\xff", "label": 1}', r"a.jsonl:1: byte 10: must be UTF-8"),
        ("a.jsonl", b'"' + b"x" * (1 << 20), r"a.jsonl:1: line longer than 1048576 bytes"),
        ("a.jsonl", b"", r"a.jsonl: rows=0"),
        ("a.jsonl", b'{"text": 1, "text": 2}', r"a.jsonl:1: .*'text' is there twice.*distinct"),
        ("a.jsonl", b'{"text": "x", "label": ' + b"9" * 5000 + b"}", r"Exceeds[^;]*digits\)$"),
        ("a.jsonl", b'{"text": {"body": "x"}, "label": 1}', r"a.jsonl:1: .*lift one.*\(body\)"),
        ("a.json", b'[{"text": "x", "label": 1}]', r"a.json:1: list: .*JSON lines.*jq"),
        ("a.json", b'[\n{"text": "x", "label": 1}\n]', r"a.json:1: list: .*JSON lines.*jq"),
        ("a.csv", b"text,label\nx,1\ny\n", r"a.csv:3: fields=1: must be 2"),
        ("a.csv", b"text,text\nx,1\n", r"a.csv:1: header=.*must be distinct"),
        ("a.csv", b'text,label\n"x,1\n', r"a.csv:2: unexpected end of data"),
        ("a.csv", b'text,label\n"x"y,1\n', r"a.csv:2: "),
        ("a.csv", b"text,label\rx,1\r", r"a.csv:1: a line ends with CR alone: must be LF or CRLF"),
        ("a.csv", b"text,label\ncaf\xe9,1\n", r"a.csv:2: byte 3: must be UTF-8.*iconv"),
        ("a.csv", "text,label\nx,1\n".encode("utf-16"), r"a.csv:1: .*UTF-16: save it as UTF-8"),
        ("a.csv", b"\x1f\x8b\x08\0", r"a.csv:1: .*compressed: unpack it"),
        ("a.csv", b"", r"a.csv: rows=0"),
        ("a.csv", b"text,label\n", r"a.csv: rows=0"),
        ("a.csv", b"Text;Label\nx;1\n", r"column='text'.*found: Text;Label; name the column"),
        ("a.csv", b"text,label\nx,\n", r"a.csv:2: label=None: .* cell is empty"),
        ("a.csv", b"text,label\n" + b"x" * 140_000 + b",1\n", r"a.csv:2: field larger than"),
        ("a.csv", b"words,label\nx,1\n", r"column='text': is missing; found: words, label"),
        ("a.parquet", b"PAR1 no", r"a.parquet: must be a Parquet file"),
        ("a.txt", b"some words", r"a.txt: columns=\['label'\]: plain text has none"),
        ("a.pkl", b"", r"suffix='.pkl': must be one of .csv, .tsv, .jsonl"),
    ],
)
def test_malformed_files_are_named_with_their_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_dataset("file", path=str(tmp_path / name))


def test_the_setting_that_named_a_missing_column_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,1\n")
    with pytest.raises(DataError, match=r"\(data.column, or another data.partition"):
        load_dataset("file", path=str(tmp_path / "a.csv"), columns=("group",))
    with pytest.raises(DataError, match=r"column='body'.*\(text-column, label-column\)"):
        load_dataset("file", path=str(tmp_path / "a.csv"), text_column="body")


@pytest.mark.parametrize(
    ("content", "texts", "names"),
    [
        ("\ufefftext,label\r\nx,a\r\ny,b\r\n", ("x", "y"), ("a", "b")),
        ("text; label \nx, or; a \ny;b\n", ("x, or", "y"), ("a", "b")),
        ('text,label\n"x\nz",2024-01-02\ny,2024-01-03\n', ("x\nz", "y"), None),
        # Numbers of patients and the like are no floats: two that differ in one digit are two.
        ("text,label\nx,12345678901234567890\ny,12345678901234567891\n", ("x", "y"), None),
    ],
)
def test_what_spreadsheets_write_is_read(
    tmp_path: Path, content: str, texts: tuple[str, ...], names: tuple[str, ...] | None
) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content.encode())
    found = load_dataset("file", path=str(path))
    assert found.texts == texts
    assert found.labels == (0, 1)
    assert names is None or found.label_names == names


def test_parquet_has_types_of_its_own(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": "x", "label": 0, "day": date(2024, 1, 2)}]
    rows[0]["sum"] = Decimal("12345678901234567890")
    path = str(write_parquet(tmp_path / "a.parquet", rows))
    assert load_dataset("file", path=path, label_column="sum").label_names == (str(rows[0]["sum"]),)
    with pytest.raises(DataError, match=r"row 1: day=.*2024.*write dates and times as text"):
        load_dataset("file", path=path, label_column="day")
    arrow = pytest.importorskip("pyarrow")
    twice = arrow.table([["x"], [1], ["y"]], names=["text", "label", "text"])
    pytest.importorskip("pyarrow.parquet").write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet: columns=.*must be distinct"):
        load_dataset("file", path=str(tmp_path / "b.parquet"))


def test_parquet_columns_are_checked(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.Table.from_pylist([{"text": "x", "label": None}]), path)
    with pytest.raises(DataError, match=r"row 1: label=None: must be a label"):
        load_dataset("file", path=str(path))
    with pytest.raises(DataError, match=r"column='topic': is missing; found: text, label"):
        load_dataset("file", path=str(path), label_column="topic")


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match="must be a data file or a folder"):
        load_dataset("file")
    with pytest.raises(DataError, match="must be a file or a folder that is there"):
        load_dataset("file", path=str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"found: notes.md"):
        load_dataset("file", path=str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "pickle"}, "dataset='pickle': must be one of choices, docstring"),
        ({"limit": 0}, "limit=0"),
        ({"text_column": ""}, "text_column=''"),
        ({"columns": ("text",)}, "columns="),
        ({"columns": ("",)}, "columns="),
        ({"passage_words": -1}, "passage_words=-1"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", ROWS)
    asked: dict[str, object] = {"kind": "file", "path": str(path)} | arguments
    with pytest.raises(ConfigError, match=message):
        load_dataset(asked.pop("kind"), **asked)  # type: ignore[arg-type]


@pytest.mark.skipif(not SHARED.is_dir(), reason="real files are not here")
def test_real_files() -> None:
    train, dev = load_splits("file", path=str(SHARED / "sst2"))
    assert dev is not None
    assert (len(train), len(dev)) == (6920, 872)
    assert train.label_names == dev.label_names == ("0", "1")
    isear = load_dataset(
        "file", path=str(SHARED / "isear" / "isear.jsonl"), columns=("subject", "sex_code")
    )
    assert len(isear) == 7577
    assert len(isear.label_names) == 7
    authors = load_dataset("file", path=str(SHARED / "gutenberg"), label_column="")
    assert set(authors.columns["source"]) == {"bronte", "darwin", "dubois"}
    wikitext = load_dataset("file", path=str(SHARED / "wikitext2"), label_column="", split="valid")
    assert len(wikitext) > 1000
